"""Examine a failure: how a system's hypotheses look, how they relate to the references, and whether they decode better.

It needs no model: hypotheses with references, token ids where there are any, and tokenizers to decode these again.
A system that recognises nothing may be input-independent (its hypotheses are unrelated to the references), have a
constant output, or recognise well and be decoded with the wrong offset, tokenizer or head. The second decoding tells
the last from the rest: the ids are decoded again, with offsets of -3 to 3, with every tokenizer at hand, with and
without special ids, and scored.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import measures
from kdlib.evaluate.posteriors import Posteriors, entropy_bits
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import score
from kdlib.evaluate.statistics import LEVEL, sign_p
from kdlib.tokens import Tokens, normalise

LEAST_GAIN = 0.01  # of WRA, from which on another decoding is worth a verdict
MIN_INFORMATION = 0.1  # of the most possible: a system below it on every measure is input-independent


@dataclass(frozen=True)
class Redecoding:
    """The same ids, decoded in another way."""

    tokenizer: str
    offset: int  # added to every id
    specials: bool  # with the ids 0, 1 and 2; False: without them
    wra: float
    by_chance: float  # WRA of these hypotheses, assigned to utterances at random
    as_written: float  # the share of hypotheses with the same text as in the file
    fixed: int = 0  # utterances that are right in this way alone
    broken: int = 0  # that are right as written alone

    @property
    def gain(self) -> float:
        """WRA above chance."""
        return self.wra - self.by_chance

    def __str__(self) -> str:
        how = f"offset {self.offset:+d}" if self.offset else "no offset"
        return f"{how}, {self.tokenizer}" + ("" if self.specials else ", without special ids")


@dataclass(frozen=True)
class Examination:
    """The result: a severity, a verdict in words, and the figures that they are based on."""

    severity: (
        str  # wrong_decoding, shifted_ids, empty, constant, input_independent, consistently_wrong, weak or healthy
    )
    verdict: str
    figures: dict[str, float]  # by name; not a number where it cannot be computed
    most_frequent: pd.DataFrame  # hypotheses, their counts, and the references that they were output for
    redecodings: list[Redecoding]  # the best first
    words: pd.DataFrame  # of each utterance: the numbers of words of reference and hypothesis
    texts: pd.DataFrame  # utt_id, reference, hypothesis as examined, and as decoded best

    @property
    def better_decoding(self) -> Redecoding | None:
        """The decoding that recognises more than the file's texts, by a sign test corrected for all that were tried."""
        if not self.redecodings:
            return None
        best, n = self.redecodings[0], self.figures["n"]
        doubt = 4 * math.sqrt(max(best.by_chance, 1 / n) / n)
        shown = sign_p(best.fixed, best.broken) * len(self.redecodings) < LEVEL
        more = best.wra - self.figures["wra"] >= LEAST_GAIN
        return best if more and shown and best.gain > doubt else None


def examine(
    table: pd.DataFrame,
    tokenizers: Mapping[str, Tokens] | None = None,
    *,
    vocabulary: Collection[str] = (),
    training: Collection[str] = (),
    teachers: Mapping[str, Sequence[int]] | None = None,
    posteriors: Path | None = None,
) -> Examination:
    """Examine hypotheses as returned by `predictions.read(..., ids=True)`.

    `tokenizers` decode the ids again, the first being the system's own; `vocabulary` and `training` are the possible
    texts, and those of the training speech; `teachers` has the token ids of the teachers' hypotheses by utterance, in
    the first tokenizer's pieces; `posteriors` is a file of the posteriors of every frame.
    """
    tokenizers = dict(tokenizers or {})
    ids = [list(row) for row in table.token_ids] if "token_ids" in table and table.token_ids.notna().all() else None
    references = table.reference.tolist()
    if (missing := table.hypothesis.isna()).any():
        if not tokenizers:
            raise UserError(
                "these hypotheses have token ids and no text: name the sentencepiece model of the system that output "
                "them (TOKENIZER=...)"
            )
        texts = next(iter(tokenizers.values())).decode_all(ids)
        table = table.assign(hypothesis=table.hypothesis.where(~missing, pd.Series(texts, table.index)))
    hypotheses = table.hypothesis.tolist()
    vocabulary, training = ({normalise(text) for text in texts} for texts in (vocabulary, training))
    figures = _text_figures(references, hypotheses, vocabulary, training)
    redecodings = second_decoding(ids, references, tokenizers, hypotheses) if ids else []
    if redecodings:
        figures |= _id_figures(ids, references, redecodings, tokenizers)
    figures |= _short_words(references, hypotheses, next(iter(tokenizers.values()), None))
    if teachers and tokenizers:
        figures |= _teacher_figures(table, ids, teachers, next(iter(tokenizers.values())))
    if posteriors and posteriors.is_file():
        figures |= _frame_figures(Posteriors(posteriors))
    texts = table[["utt_id", "reference", "hypothesis"]].copy()
    words = pd.DataFrame({"reference": _word_counts(references), "words": _word_counts(hypotheses)})
    result = Examination("", "", figures, most_frequent(references, hypotheses), redecodings, words, texts)
    if best := result.better_decoding:
        texts["read anew"] = _texts(ids, tokenizers[best.tokenizer], best.offset, best.specials)
    severity, verdict = _judge(result)
    return replace(result, severity=severity, verdict=" ".join([verdict, *_prefers_short_words(result)]))


def second_decoding(
    ids: Sequence[Sequence[int]], references: Sequence[str], tokenizers: Mapping[str, Tokens], written: Sequence[str]
) -> list[Redecoding]:
    """WRA of each way of decoding the ids, the best above chance first; between equal ones the simplest first."""
    redecodings, reference_counts = [], Counter(references)
    ways = (True, False) if any(token < 3 for row in ids for token in row) else (True,)
    references, written = np.array(references, dtype=object), np.array(written, dtype=object)
    as_written = written == references
    for name, tokenizer in tokenizers.items():
        for specials in ways:
            for offset in measures.OFFSETS:
                texts = np.array(_texts(ids, tokenizer, offset, specials), dtype=object)
                pairs = sum(reference_counts[text] * count for text, count in Counter(texts).items())
                right, same = texts == references, float((texts == written).mean())
                chance = pairs / len(references) ** 2
                paired = int((right & ~as_written).sum()), int((as_written & ~right).sum())
                redecodings.append(Redecoding(name, offset, specials, float(right.mean()), chance, same, *paired))
    return sorted(redecodings, key=lambda way: (-round(way.gain, 9), abs(way.offset), not way.specials))


def most_frequent(references: Sequence[str], hypotheses: Sequence[str], count: int = 10) -> pd.DataFrame:
    """The most frequent hypotheses, and the references that they were output for."""
    references_of: dict[str, Counter] = defaultdict(Counter)
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        references_of[hypothesis][reference] += 1
    rows = []
    for hypothesis, counts in sorted(references_of.items(), key=lambda row: (-row[1].total(), row[0]))[:count]:
        names = ", ".join(f"{reference} {times}" for reference, times in counts.most_common(4))
        more = f", {len(counts) - 4} more" if len(counts) > 4 else ""
        rows.append(
            {
                "hypothesis": hypothesis or "(empty)",
                "times": counts.total(),
                "share %": percent(counts.total() / len(hypotheses)),
                "references": len(counts),
                "most frequent references": names + more,
            }
        )
    return pd.DataFrame(rows)


def _text_figures(
    references: list[str], hypotheses: list[str], vocabulary: set[str], training: set[str]
) -> dict[str, float]:
    """The figures that need texts only."""
    n, scores = len(references), score(references, hypotheses, bootstrap=200)
    counts, reference_counts = Counter(hypotheses), Counter(references)
    words = [word for text in hypotheses for word in text.split()]
    vocabulary_words = {word for text in [*references, *vocabulary] for word in text.split()}
    training_words = {word for text in training for word in text.split()}
    same, any_same = measures.consistency(references, hypotheses)
    similarity, similarity_by_chance = measures.letter_similarity(references, hypotheses)
    pairs = list(zip(references, hypotheses, strict=True))
    wrong = [(ref, hyp) for ref, hyp in pairs if ref != hyp]
    unseen = [ref == hyp for ref, hyp in pairs if ref not in training] if training else []
    seen = [ref == hyp for ref, hyp in pairs if ref in training] if training else []
    return {
        "n": n,
        "wra": scores.wra,
        "wra_by_chance": sum(reference_counts[text] * count for text, count in counts.items()) / n**2,
        "wer": scores.wer,
        "cer": scores.cer,
        "substitutions": scores.substitutions,
        "deletions": scores.deletions,
        "insertions": scores.insertions,
        "references": len(reference_counts),
        "distinct_texts": len(counts),
        "effective_answers": measures.effective_number(hypotheses),  # as many equally frequent hypotheses
        "effective_references": measures.effective_number(references),
        "most_frequent": max(counts.values()) / n,
        "empty": counts[""] / n,
        "repetition": measures.loops([text.split() for text in hypotheses]),
        "words_per_reference": len(words) / sum(_word_counts(references)),
        "vocabulary_words": _mean([word in vocabulary_words for word in words]),
        "training_words": _mean([word in training_words for word in words]) if training_words else math.nan,
        "wra_seen": _mean(seen),
        "wra_unseen": _mean(unseen),
        "truncated": _mean([bool(hyp) and ref.startswith(hyp) for ref, hyp in wrong]),
        "overlong": _mean([hyp.startswith(ref) for ref, hyp in wrong]),
        "consistency": same,
        "consistency_by_chance": any_same,
        "letter_similarity": similarity,
        "letter_similarity_by_chance": similarity_by_chance,
        **measures.shared_bits(references, hypotheses),
    }


def _id_figures(
    ids: list[list[int]], references: list[str], redecodings: Sequence[Redecoding], tokenizers: Mapping[str, Tokens]
) -> dict[str, float]:
    """The figures of token ids; compared with those of the references where a tokenizer can encode these."""
    figures = {
        "distinct_tokens": len(set(map(tuple, ids))),
        "token_repetition": measures.loops(ids),
        "special_ids": _mean([token < 3 for row in ids for token in row]),
    }
    alike = max(redecodings, key=lambda way: (way.as_written, way.gain))  # the file's own decoding, or the most similar
    name = redecodings[0].tokenizer if redecodings[0].gain > MIN_INFORMATION else alike.tokenizer
    encoded = {text: _encode(text, tokenizers[name]) for text in set(references)}
    pairs = [(row, encoded[text]) for row, text in zip(ids, references, strict=True) if encoded[text]]
    if len(pairs) < len(ids) / 2:  # a tokenizer that cannot encode the references is not the system's
        return figures
    ids, targets = (list(side) for side in zip(*pairs, strict=True))
    matches = measures.offset_matches(ids, targets)
    off = max((offset for offset in measures.OFFSETS if offset), key=lambda offset: matches[offset])
    counts, target_counts = (Counter(token for row in rows for token in row) for rows in (ids, targets))
    later, earlier = measures.position_matches(ids, targets, 1), measures.position_matches(ids, targets, -1)
    return figures | {
        "tokens_per_reference": sum(map(len, ids)) / max(1, sum(map(len, targets))),
        "tokens_right": matches[0],
        "tokens_off_by_one": max(matches[1], matches[-1]),
        "tokens_off": matches[off],
        "off_by": off,
        "tokens_displaced": max(later, earlier),  # by one position
        "histogram": measures.js_divergence(counts, target_counts),
        "unknown_tokens": _mean([token not in target_counts for row in ids for token in row]),  # in no reference
    }


def _short_words(references: list[str], hypotheses: list[str], tokenizer: Tokens | None) -> dict[str, float]:
    """The shares of hypotheses and references of one token; of at most two letters without a tokenizer of them."""
    texts = sorted(set(references) | set(hypotheses) - {""})
    sizes = {text: len(_encode(text, tokenizer)) for text in texts} if tokenizer else {}
    if not sizes or min(sizes.values()) == 0:
        sizes = {text: 1 if len(text) < 3 else 2 for text in texts}
    shares = {"answers": hypotheses, "references": references}
    return {f"short_{name}": _mean([sizes.get(text) == 1 for text in rows]) for name, rows in shares.items()}


def _prefers_short_words(result: Examination) -> list[str]:
    """A remark on a system that chooses among known words, and short ones more often than they were said."""
    figures, n = result.figures, result.figures["n"]
    answers, references = figures["short_answers"], figures["short_references"]
    both = (answers + references) / 2
    clear = max(references / 2, 3 * math.sqrt(2 * both * (1 - both) / n))
    if result.better_decoding or figures["vocabulary_words"] < 1 or answers - references <= clear:
        return []
    return [
        f"Short words are preferred: {percent(answers)} % of the answers are of the shortest, {percent(references)} % "
        "of the references. An unsure CTC model does that: calibrate the closed lexicon before any comparison."
    ]


def _teacher_figures(
    table: pd.DataFrame, ids: list[list[int]] | None, teachers: Mapping[str, Sequence[int]], tokens: Tokens
) -> dict[str, float]:
    """The agreement of hypotheses with the teachers' on the same utterances, in particular where these are wrong."""
    shared = table.utt_id.isin(set(teachers)).to_numpy()
    rows = table[shared]
    teacher_ids = [list(teachers[utt_id]) for utt_id in rows.utt_id]
    texts = np.array(tokens.decode_all(teacher_ids), dtype=object)
    references, hypotheses = rows.reference.to_numpy(object), rows.hypothesis.to_numpy(object)
    figures = {
        "agrees_with_teachers": _mean(hypotheses == texts),
        "agrees_with_teachers_wrong": _mean((hypotheses == texts)[texts != references]),
        "teachers_wra": _mean(texts == references),
    }
    if ids:
        counts = Counter(token for row, used in zip(ids, shared, strict=True) if used for token in row)
        teacher_counts = Counter(token for row in teacher_ids for token in row)
        figures["histogram_of_teachers"] = measures.js_divergence(counts, teacher_counts)
    return figures


def _frame_figures(posteriors: Posteriors) -> dict[str, float]:
    """The share of blank frames, and the certainty of the frames."""
    blank, entropy, sure = [], [], []
    for utt_id in posteriors:
        logprobs = posteriors[utt_id]
        if len(logprobs):
            blank.append((logprobs.argmax(-1) == posteriors.blank).mean())
            entropy.append(entropy_bits(logprobs).mean())
            sure.append((np.exp(logprobs.max(-1)) > 0.9).mean())
    return {"blank_frames": _mean(blank), "entropy_bits": _mean(entropy), "sure_frames": _mean(sure)}


def above_chance(value: float, chance: float) -> float:
    """A share's excess over chance, relative to the most that is possible."""
    return (value - chance) / max(1e-9, 1 - chance)


def _judge(result: Examination) -> tuple[str, str]:
    """The severity as a key, and the verdict in a sentence or two."""
    figures, better = result.figures, result.better_decoding
    sentences = result.words.reference.mean() > 1.5
    accuracy = max(0.0, 1 - figures["wer"]) if sentences else figures["wra"]
    wra = f"WRA {percent(figures['wra'])} %" + (f", WER {percent(figures['wer'])} %" if sentences else "")
    if better:
        own = next((way for way in result.redecodings if way.as_written > 0.99), None)
        was = f" (in the file: {own})" if own and own != better else ""
        gives = f"give WRA {percent(better.wra)} % instead of {percent(figures['wra'])} %"
        if better.offset:
            return "shifted_ids", (
                f"SHIFTED TOKEN IDS: the same token ids, decoded with {better}{was}, {gives}. The system was trained "
                "on shifted ids, or they were written so."
            )
        return "wrong_decoding", (
            f"WRONG DECODING: the same token ids, decoded with {better}{was}, {gives}. This is a fault of decoding, "
            "not of training."
        )
    if figures["empty"] > 0.5:
        return "empty", f"EMPTY OUTPUT: {100 * figures['empty']:.0f} % of the hypotheses are empty; {wra}."
    bits, most, by_chance = (figures[name] for name in ("bits", "bits_of", "bits_by_chance"))
    bits_text = f"hypotheses carry {bits:.1f} of the references' {most:.1f} bits ({by_chance:.1f} by chance)"
    same, same_by_chance = figures["consistency"], figures["consistency_by_chance"]
    same_text = f"hypotheses of one word agree in {100 * same:.0f} % of pairs, any two in {percent(same_by_chance)} %"
    if math.isnan(same):
        same_text = "no reference occurs twice"
    letters, letters_by_chance = figures["letter_similarity"], figures["letter_similarity_by_chance"]
    letters_text = f"{100 * letters:.0f} % of the letters are correct, {100 * letters_by_chance:.0f} % by chance"
    excess = {
        bits_text: figures["information"],
        same_text: above_chance(same, same_by_chance),
        letters_text: above_chance(letters, letters_by_chance),
    }
    evidence = "; ".join(text for text, value in excess.items() if value > MIN_INFORMATION) or bits_text
    if figures["most_frequent"] > 0.5 and figures["references"] > 3:
        top = result.most_frequent.iloc[0].hypothesis
        share = 100 * figures["most_frequent"]
        return "constant", f"CONSTANT OUTPUT: {share:.0f} % of the hypotheses are {top!r}; {wra}."
    if figures["references"] > 3 and accuracy < 0.1 and not any(value > MIN_INFORMATION for value in excess.values()):
        words = figures["words_per_reference"]
        length = f" It outputs {words:.0f} words per reference word." if words > 2 else ""
        again = " No other decoding of its token ids is better." if result.redecodings else ""
        verdict = f"INPUT-INDEPENDENT: the hypotheses are unrelated to the references ({same_text}); {wra}."
        return "input_independent", verdict + length + again
    if accuracy < 0.05:
        return "consistently_wrong", f"CONSISTENTLY WRONG: {wra}, but the output depends on the input: {evidence}."
    if accuracy < 0.5:
        return "weak", f"WEAK: {wra}; the output depends on the input: {evidence}."
    return "healthy", f"HEALTHY: {wra}; {evidence}."


def _texts(ids: Sequence[Sequence[int]], tokenizer: Tokens, offset: int, specials: bool) -> list[str]:
    """The texts of ids, with an offset added, and with or without the special ids."""
    rows = list(dict.fromkeys(map(tuple, ids)))
    texts = tokenizer.decode_all([token + offset for token in row if specials or token > 2] for row in rows)
    text_of = dict(zip(rows, texts, strict=True))
    return [text_of[tuple(row)] for row in ids]


def _encode(text: str, tokenizer: Tokens) -> list[int]:
    """The ids of a text; none where it cannot be encoded, as hyphens often cannot, or where its case is unknown."""
    try:
        return [] if tokenizer.cased == "mixed" else tokenizer.encode(text)
    except UserError:
        return []


def _word_counts(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _mean(values: Sequence) -> float:
    return float(np.mean(values)) if len(values) else math.nan
