"""What counts as the same text when hypotheses are scored: applied to references and hypotheses alike.

`phoenix2014` and `phoenix2014t` are the rules of RWTH-PHOENIX-Weather's own evaluation, of glosses of German Sign
Language: marks of location, classifiers and possession are no other gloss, signs that are no glosses do not count.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files

from kdlib.tokens import normalise

EMPTY = "[EMPTY]"  # a text of which nothing is left
MARKS = re.compile(r"^(?:LOC|CL|QU|POSS|LH)-")
MARKS_T = re.compile(r"^(?:LOC|CL)-")
NO_GLOSS = re.compile(r"^__\w+__$")  # __EMOTION__, __PU__, __LEFTHAND__, __ON__
SPELT = re.compile(r"^[A-Z](?:\+[A-Z])*$")  # letters of the finger alphabet
SAME = {"S0NNE": "SONNE", "HABEN2": "HABEN", "ZEIGEN": "ZEIGEN-BILDSCHIRM"}
PAIRS = {("WIE", "AUSSEHEN"): "WIE-AUSSEHEN"}


def homophones(text: str) -> str:
    """Every word replaced by the first of its homophones.

    >>> homophones("two write")
    'TO RIGHT'
    """
    return " ".join(_homophones().get(word, word) for word in normalise(text).split())


def phoenix2014(text: str) -> str:
    """The glosses that PHOENIX-2014 scores.

    >>> phoenix2014("__ON__ loc-ALPEN S0NNE SONNE HABEN2 WIE AUSSEHEN A B REGION-PLUSPLUS NORDRAUM")
    'ALPEN SONNE HABEN WIE-AUSSEHEN A+B REGION NORD'
    >>> phoenix2014("__EMOTION__ __PU__")
    '[EMPTY]'
    """
    return _phoenix(text, MARKS, SAME)


def phoenix2014t(text: str) -> str:
    """The glosses that PHOENIX-2014-T scores: the same rules but those of its older annotation.

    >>> phoenix2014t("cl-WOLKE poss-SEIN HABEN2 ZEIGEN")
    'WOLKE POSS-SEIN HABEN2 ZEIGEN'
    """
    return _phoenix(text, MARKS_T, {})


NORMALISERS: Mapping[str, Callable[[str], str]] = {
    "none": normalise,
    "homophones": homophones,
    "phoenix2014": phoenix2014,
    "phoenix2014t": phoenix2014t,
}


def _phoenix(text: str, marks: re.Pattern, same: Mapping[str, str]) -> str:
    glosses: list[str] = []
    for word in normalise(text).split():
        gloss = marks.sub("", word)
        if NO_GLOSS.match(word) or not gloss:
            continue
        gloss = re.sub(r"-PLUSPLUS$", "", gloss)
        gloss = re.sub(r"(?<=[A-Z]{2})RAUM$", "", gloss)
        gloss = same.get(gloss, gloss)
        if glosses and (pair := PAIRS.get((glosses[-1], gloss))):
            glosses[-1] = pair
        elif glosses and SPELT.match(gloss) and SPELT.match(glosses[-1]):
            glosses[-1] += f"+{gloss}"
        elif not glosses or glosses[-1] != gloss:  # immediate repetitions count once
            glosses.append(gloss)
    return " ".join(glosses) or EMPTY


@functools.cache
def _homophones() -> dict[str, str]:
    groups = json.loads(files("kdlib").joinpath("data/homophones.json").read_text(encoding="utf-8"))
    return {word: group[0] for group in groups for word in group}
