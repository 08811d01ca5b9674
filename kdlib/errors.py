"""The exception for users: what was expected, what was found, where, and what to do."""

from difflib import get_close_matches


class UserError(ValueError):
    """An error of the input, not of the program. Notebooks show only its message, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class DivergedError(UserError):
    """A training whose loss is not finite."""


def nearest(name: str, valid: list[str]) -> str:
    """Suggest the valid name that was probably meant.

    >>> nearest("helt_out", ["held_out", "fold"])
    "; did you mean 'held_out'?"
    >>> nearest("M99", ["M08", "M05"])
    '; expected one of M05, M08'
    """
    close = get_close_matches(str(name), valid, n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(valid))}"
