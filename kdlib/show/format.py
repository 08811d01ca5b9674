"""Tables for display: shares become per cent, rounded, and columns get names for readers. Stages store neither."""

from collections.abc import Sequence

import pandas as pd

from kdlib.evaluate.rounding import percent, span
from kdlib.evaluate.verdict import Verdict

LEVEL_ORDER = ("CONTROL", "HIGH", "MID", "LOW", "VERY_LOW", "?")


def headline(scores: dict) -> pd.DataFrame:
    """One row per decoder: WRA with its interval, first-word WRA, WER with its parts, CER."""
    rows = []
    for name, result in scores["decoders"].items():
        low, high = result["ci95"]
        rows.append(
            {
                "decoder": name,
                "n": result["n"],
                "WRA": percent(result["wra"]),
                "95 % interval": f"{percent(low)} - {percent(high)}",
                "first-word WRA": percent(result["wra_first_word"]),
                "WER": percent(result["wer"]),
                "S": result["substitutions"],
                "D": result["deletions"],
                "I": result["insertions"],
                "CER": percent(result["cer"]),
            }
        )
    return pd.DataFrame(rows).set_index("decoder")


def breakdown(scores: dict) -> pd.DataFrame:
    """WRA by word type and by whether the word was seen in training; one column per decoder."""
    rows = {}
    for name, decoder in scores["decoders"].items():
        for group in ("word_type", "seen"):
            for part, result in decoder["by"][group].items():
                label = f"seen in {scores.get('seen_in', 'training')}: {part}" if group == "seen" else part
                rows.setdefault(label, {"n": result["n"]})[f"{name} WRA"] = percent(result["wra"])
    return pd.DataFrame.from_dict(rows, orient="index")


def parent_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """`parent_scores.read_gains` in per cent and points: one row per teacher, and their mean."""
    rows: dict[str, dict] = {}
    means = gains.groupby("decoder", sort=False)[["parent_right", "teacher_right", "gain", "n"]].mean().reset_index()
    for row in pd.concat([gains, means.assign(teacher="mean")]).itertuples():
        shown = {"parent": percent(row.parent_right), "teacher": percent(row.teacher_right)}
        shown |= {"gain": f"{percent(row.gain):+.1f}", "95 %": span(row.low, row.high)}
        named = {f"{row.decoder} {name}": value for name, value in shown.items()}
        rows.setdefault(row.teacher, {"utterances": round(row.n)}).update(named)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("teacher")


def by_level(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean WRA over the speakers of each published intelligibility level, by decoder; of `tables.by_speaker`."""
    wide = percent(scores.pivot_table(index="level", columns="decoder", values="wra"))
    wide = wide[list(dict.fromkeys(scores.decoder))]
    wide.insert(0, "speakers", scores.groupby("level").speaker.nunique())
    return wide.reindex([name for name in LEVEL_ORDER if name in wide.index])


def target_report(report: pd.DataFrame) -> pd.DataFrame:
    """`target_report.report_frame` by kind of speech and aggregate."""
    shares = {"greedy_wra": "greedy WRA", "lexicon_wra": "lexicon WRA", "blank_share": "blank frames"}
    shares |= {"empty_share": "empty output"}
    shown = report.assign(**{name: percent(report[name]) for name in shares})
    names = shares | {name: name.replace("_", " ") for name in ("distinct_hypotheses", "distinct_references")}
    shown = shown.rename(columns=names | {"method": "aggregate"})
    return shown.set_index(["speech", "aggregate"]).sort_index(level=0, sort_remaining=False)


def method_gains(gains: pd.DataFrame) -> pd.DataFrame:
    """`target_report.method_gains` in per cent and points."""
    names = {"dev": "dev", "training": "training", "dev_gain": "gain on dev", "training_gain": "gain on training"}
    return percent(gains).rename(columns=names | {"gain": "counts for auto"})


def fold_table(scores: pd.DataFrame, measure: str) -> pd.DataFrame:
    """`comparison.fold_scores`: one row per system and seed, and the mean over the seeds of each variant."""
    part = scores[scores.measure == measure]
    means = part[part.seed.map(lambda seed: isinstance(seed, int))]
    means = means.groupby(["fold", "system", "column"], sort=False).value.mean().reset_index().assign(seed="mean")
    keys = ["fold", "system", "seed"]
    wide = pd.concat([part, means]).pivot(index=keys, columns="column", values="value")
    order = list(dict.fromkeys(map(tuple, pd.concat([part, means])[keys].itertuples(index=False))))
    wide = percent(wide[list(dict.fromkeys(part.column))].loc[order]).rename_axis(columns=None)
    remarks = scores.dropna(subset="remark").drop_duplicates(keys).set_index(keys).remark
    return wide.assign(remark=remarks.reindex(wide.index)) if len(remarks) else wide


def verdict_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per pair of systems."""
    rows = []
    for verdict in verdicts:
        rows.append(
            {
                "a": verdict.a,
                "b": verdict.b,
                "measure": verdict.measure.upper(),
                "a %": percent(verdict.a_value),
                "b %": percent(verdict.b_value),
                "difference": f"{percent(verdict.difference):+.1f}",
                "these speakers": span(verdict.these_low, verdict.these_high),
                "new speakers": span(verdict.new_low, verdict.new_high),
                "n": f"{verdict.utterances} x {verdict.speakers} sp. x {verdict.seeds} seed{'s' * (verdict.seeds > 1)}",
                "Holm p": f"{verdict.holm_p:.2g}",
                "verdict": f"{verdict.verdict}: {verdict.caveat}" if verdict.caveat else verdict.verdict,
            }
        )
    return pd.DataFrame(rows)


def collapse_summary(summary: pd.DataFrame) -> pd.DataFrame:
    """`collapse_study.summary` by student and seed."""
    shown = summary.assign(wra=percent(summary.wra), information=percent(summary.information, 0))
    names = {"wra": "WRA %", "information": "information %", "distinct_texts": "different answers"}
    names |= {"cause_made": "cause made", "causes_named": "cause named"}
    return shown.rename(columns=names).set_index(["student", "seed"])


def factorial(table: pd.DataFrame) -> pd.DataFrame:
    """`collapse_study.factorial`, with the intervals of WRA and of the difference to the control."""
    per_cent = table.assign(**{name: percent(table[name]) for name in table.select_dtypes("float")})
    rows = list(per_cent.itertuples())
    per_cent["95 %"] = [f"{row.low} - {row.high}" for row in rows]
    per_cent["difference, 95 %"] = [
        ""
        if row.verdict == "control"
        else f"{row.difference:+.1f} ({row.difference_low:+.1f} to {row.difference_high:+.1f})"
        for row in rows
    ]
    return per_cent.set_index(["student", "head", "system"])[["WRA", "95 %", "difference, 95 %", "verdict"]]


def effects(table: pd.DataFrame) -> pd.DataFrame:
    """`collapse_study.effects` in points."""
    return percent(table)
