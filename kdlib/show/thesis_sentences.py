"""The sentence that one may write about each figure and table of a thesis, generated from its numbers."""

import pandas as pd

from kdlib.evaluate.rounding import percent, span
from kdlib.evaluate.verdict import NO_DIFFERENCE
from kdlib.show.thesis_figures import main_decoder
from kdlib.show.thesis_tables import Results


def _of(results: Results) -> str:
    part = results.scores[results.scores.measure == results.measure]
    folds, seeds = list(dict.fromkeys(part.held_out)), sorted({seed for seed in part.seed if isinstance(seed, int)})
    where = f"fold {folds[0]}" if len(folds) == 1 else f"{len(folds)} folds"
    count = f", {len(seeds)} seed{'s' * (len(seeds) > 1)}" if seeds else ""
    return f"On {where} ({int(part.groupby('held_out').n.first().sum())} utterances{count})"


def accuracy(table: pd.DataFrame, results: Results) -> str:
    """The mean of every system."""
    means = table.groupby("system", sort=False)["mean"].mean()
    parts = ", ".join(f"{system} {percent(value):.1f} %" for system, value in means.items())
    return f"{_of(results)}, mean {results.measured} ({main_decoder(results)}) was: {parts}."


def difference(table: pd.DataFrame, results: Results) -> str:
    """Every difference, with its verdict."""
    parts = []
    for row in table.itertuples():
        interval, difference = span(row.these_low, row.these_high), percent(row.difference)
        word = row.verdict if row.verdict == NO_DIFFERENCE else f"{row.verdict} than {row.b}"
        numbers_of = f"95 % {interval}, corrected p = {row.holm_p:.2g}"
        parts.append(f"{row.a} differed from {row.b} by {difference:+.1f} points ({numbers_of}): {word}")
    return f"{_of(results)}, {'; '.join(parts)}."


def curve(table: pd.DataFrame, results: Results) -> str:
    """Where the best validation was."""
    best = table.loc[table.groupby(["held_out", "system", "seed"]).value.idxmax()]
    last = table.groupby("system").step.max()
    by_system = best.groupby("system", sort=False)
    parts = [f"{system} at step {int(part.step.median())} of {int(last[system])}" for system, part in by_system]
    return f"The best validation on the dev speaker (median over folds and seeds) was that of {', '.join(parts)}."


def confidence(table: pd.DataFrame, results: Results) -> str:
    """The calibration error of every system."""
    parts = [f"{system} {percent(part.ece.iloc[0]):.1f} %" for system, part in table.groupby("system", sort=False)]
    return f"{_of(results)}, the expected calibration error of the closed lexicon was: {', '.join(parts)}."


def speaker(table: pd.DataFrame, results: Results) -> str:
    """The pretrained model's range over the speakers."""
    decoder = table.decoder.iloc[0]
    part = table[table.decoder == decoder]
    return (
        f"Before any training the pretrained model recognised between {percent(part.wra.min()):.1f} and "
        f"{percent(part.wra.max()):.1f} % of the words ({decoder}; {len(part)} speakers)."
    )


def teacher(table: pd.DataFrame, results: Results) -> str:
    """Teachers on their own speakers and on others."""
    part = table[table.decoder == table.decoder.iloc[0]]
    own, others = part[part.teacher == part.speaker].value.mean(), part[part.teacher != part.speaker].value.mean()
    count, decoder = part.teacher.nunique(), part.decoder.iloc[0]
    if results.measure == "wer":
        rates = f"{percent(own):.1f} % on their own speakers and {percent(others):.1f} % on others"
        return f"The {count} teachers had word error rates of {rates} ({decoder})."
    rates = f"{percent(own):.1f} % of their own speakers' words and {percent(others):.1f} % of other speakers'"
    return f"The {count} teachers recognised {rates} ({decoder})."


def target(table: pd.DataFrame, results: Results) -> str:
    """The best combination of the teachers."""
    part = table[(table.speech == "training") & (table.remark == "")]  # others know references, or the speech
    if part.empty:
        return ""
    if results.measure == "wer":
        best = part.loc[part.greedy_wer.idxmin()]
        return f"On training speech the best combination was {best.method}, with {percent(best.greedy_wer):.1f} % WER."
    best = part.loc[part.lexicon_wra.idxmax()]
    rates = f"{percent(best.lexicon_wra):.1f} % ({percent(best.greedy_wra):.1f} % greedily)"
    return f"On training speech the best combination in the closed lexicon was {best.method}, with {rates}."


def effect(table: pd.DataFrame, results: Results) -> str:
    """The effects of a set of ablations."""
    parts = [
        f"{row.factor} {row.level} against {row.against} {percent(row.difference):+.1f} points "
        f"({span(row.these_low, row.these_high)}): {row.verdict}"
        for row in table.itertuples()
    ]
    return f"Effects in the set: {'; '.join(parts)}."


def sweep(table: pd.DataFrame, results: Results) -> str:
    """How beam search was set."""
    best, plain = table[table.chosen].iloc[0], table[(table.lm_weight == 0) & (table.word_bonus == 0)]
    against = f", {percent(plain.wer.min()):.1f} % without a language model" if len(plain) else ""
    return (
        f"Beam search was set on the dev speaker {best.dev} of the fold {best.held_out}: LM weight "
        f"{best.lm_weight:g}, word bonus {best.word_bonus:g} nats and a beam of {int(best['size'])} gave "
        f"{percent(best.wer):.1f} % WER{against}."
    )


def confusion(table: pd.DataFrame, results: Results) -> str:
    """How often the cause was named."""
    wide = table.set_index("cause")
    right = sum(wide.loc[name, name] for name in wide.index if name in wide.columns)
    return f"From other seeds' fingerprints the cause was named in {right:g} of {wide.to_numpy().sum():g} students."


def none(table: pd.DataFrame, results: Results) -> str:
    """Nothing that one could write."""
    return ""
