"""Short sentences for the embedded corpus: a small grammar over UA-Speech's words.

Isolated words hardly need a language model; sentences do. A sentence has three to six words and belongs to one block,
so that no sentence of a test block is ever trained on, though all its words are.
"""

import functools
import itertools
import zlib

from kdlib.corpus.importers.uaspeech import BLOCKS

THING = ("LINE", "WORD", "SENTENCE", "PARAGRAPH", "NUMBER", "PART")
WHICH = ("THE", "THAT", "THIS", "EACH", "THE FIRST", "THE OTHER", "THE LEFT", "THE LONG")
COUNT = ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
WHOM = ("HIM", "HER", "THEM", "MANY PEOPLE", "THE OTHER PEOPLE", "THE WATER", "THE OIL", "MY NUMBER", "YOUR PART")
RULES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("DELETE", "COPY", "PASTE", "CUT", "FIND", "MAKE"), WHICH, THING),
    (("FIND", "CALL", "WRITE"), ("THE", "THAT"), ("NUMBER", "LINE"), COUNT),
    (("GO",), ("UP", "DOWN", "LEFT", "RIGHT"), COUNT, ("NOW", "TIME", "MORE")),
    (("GO TO",), ("LINE", "PARAGRAPH", "SENTENCE", "PART"), COUNT, ("", "NOW")),
    (("I", "YOU", "WE", "THEY"), ("WILL", "COULD", "MAY", "WOULD"), ("SEE", "FIND", "CALL", "USE", "LIKE"), WHOM),
    (("HE", "SHE"), ("SAID", "WAS", "DID"), ("YES", "NO", "ALL"), ("TO", "WITH", "FOR"), ("HIM", "HER", "THEM")),
)


@functools.cache
def sentences() -> dict[str, tuple[str, ...]]:
    """All sentences of the grammar with three to six words, by block."""
    by_block: dict[str, list[str]] = {block: [] for block in BLOCKS}
    for rule in RULES:
        for parts in itertools.product(*rule):
            text = " ".join(part for part in parts if part)
            if 3 <= len(text.split()) <= 6:
                by_block[BLOCKS[zlib.crc32(text.encode()) % len(BLOCKS)]].append(text)
    return {block: tuple(sorted(set(texts))) for block, texts in by_block.items()}
