"""The first line of a notebook: what it found, written there once it is known."""

from IPython.display import Markdown, display


class Headline:
    """A line of a notebook that a later cell replaces; a saved notebook shows the last one."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._handle = display(Markdown(text), display_id=True)

    def lead_with(self, text: str) -> None:
        """Put a text before the line; nothing if it is empty."""
        if text:
            self._handle.update(Markdown(f"**{text}**\n\n{self.text}"))
