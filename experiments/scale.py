"""Findings of the paper, and what critics ask of them, against the size of the model: from rows to effects, verdicts, tables and a figure.

    uv run python -m anchors.experiments.scale experiments/results --page experiments/RESULTS.md    # writes scale/ there, and the tables of the page

An effect is a number that lies above 0 where the finding holds: the mean over tasks, with a paired bootstrap over seeds and
examples. A cell *holds* where all of its interval lies above 0, and is *reversed* where all of it lies below, after Bonferroni's
correction for all findings (`anchors.intervals.widened`); fewer than 10 prompts decide nothing. A finding then holds **at every
size** where every cell holds, **from a size on** where that one and all larger ones do and no smaller one does, **nowhere** where none
does, and is **mixed** otherwise. Models of two families differ in more than size, so one column compares the two of one family.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from anchors.experiments.grid import Rows
from anchors.intervals import estimate, interval, widened
from anchors.places import titled
from anchors.stats import ENTROPY, flow_summary, parts_by, resampling, within_seeds
from anchors.study.results import read_table, write_atomic, write_table
from anchors.summaries.causal import ratio
from anchors.summaries.critiques import RESAMPLES as FEW
from anchors.summaries.critiques import flow_samples, follows, pooled_samples
from anchors.summaries.diagnosis import diagnosis_summary
from anchors.summaries.readout import aucroc, readout_summary, scores_of
from anchors.summaries.tables import reduced

FEWEST, RESAMPLES = 10, 1000
SIZES = {"SmolLM2-135M": 0.135, "qwen2.5-coder-0.5b": 0.494, "qwen2.5-coder-1.5b": 1.54}
"""Billions of parameters, by how a model's name begins; other models are left out."""
TITLES = {0.135: "SmolLM2 135M", 0.494: "Qwen2.5-Coder 0.5B", 1.54: "Qwen2.5-Coder 1.5B"}
GROWTH = (0.494, 1.54)
"""Two sizes of one family."""
GROWN = "1.5B − 0.5B"
"""What stands for the model where the effect is the difference of theirs."""
MARKS = ("<!-- scale -->", "<!-- /scale -->")
DEPTH = ("<!-- depth -->", "<!-- /depth -->")
Samples = dict[str, np.ndarray]
"""By task the effect (first) and its resamples."""


@dataclass(frozen=True)
class Finding:
    """What is claimed, and how large it is in rows.

    Attributes:
        name, claim: in a word, and in words.
        source: who claims or asks it.
        experiment: whose rows tell.
        effect: by task, above 0 where the claim is true.
    """

    name: str
    claim: str
    source: str
    experiment: str
    effect: Callable[[Rows], Samples]


def _groups(rows: pd.DataFrame, **only: Any) -> list[tuple[str, pd.DataFrame]]:
    """By task the rows of prompts with these shots and this control."""
    own = rows[rows["number"] >= 0]
    for name, value in only.items():
        own = own[own[name] == value]
    return [(str(task), group) for (task,), group in parts_by(own, ["task"])]


def _gap(kind: str, metric: str, one: str, other: str, **only: Any) -> Callable[[Rows], Samples]:
    """The mean of a metric under one condition, less that under another, on the same prompts."""

    def effect(rows: Rows) -> Samples:
        every = reduced(rows[kind]) if kind == "compress" else rows[kind]
        found = {}
        for task, group in _groups(every, **only):
            own = group[(group["metric"] == metric) & group["condition"].isin([one, other])]
            wide = own.pivot_table(index=["seed", "number"], columns="condition", values="value").dropna()
            weights = resampling(wide.index.to_frame(index=False), RESAMPLES)
            found[task] = weights @ (wide[one] - wide[other]).to_numpy() / weights.sum(1)
        return found

    return effect


def _flow(sign: dict[str, int], side: str) -> Callable[[Rows], Samples]:
    """The mean over a third of the layers of shares of the flow, added with signs."""

    def effect(rows: Rows) -> Samples:
        found = {}
        for task, group in _groups(rows["flow"], shots=1):
            shares = flow_samples(group, RESAMPLES)
            third = max(1, shares["s_pq"].shape[1] // 3)
            where = slice(third) if side == "first" else slice(-third, None)
            found[task] = sum(s * shares[name][:, where].mean(1) for name, s in sign.items())
        return found

    return effect


def _shots(metric: str, sign: int) -> Callable[[Rows], Samples]:
    """How much a number of the flow changes from one shot to the most, in the last third of the layers; seeds are the same."""

    def effect(rows: Rows) -> Samples:
        found, most = {}, rows["flow"]["shots"].max()
        for task, one in _groups(rows["flow"], shots=1):
            more = dict(_groups(rows["flow"], shots=most)).get(task)
            every = (flow_samples(group, RESAMPLES).get(metric) for group in (one, more) if group is not None)
            both = [own for own in every if own is not None]
            if len(both) == 2:
                third = max(1, both[0].shape[1] // 3)
                first, last = (own[:, -third:].mean(1) for own in both)
                found[task] = sign * (last - first)
        return found

    return effect


def _auc(group: pd.DataFrame) -> np.ndarray:
    scores, predicted, units = scores_of(group)
    return within_seeds(units, resampling(units, FEW), lambda own, w: aucroc(scores[own], predicted[own], w))


def _deep(rows: Rows) -> Samples:
    """Mean AUCROC in the last third of the layers, less one half."""
    found = {}
    for task, group in _groups(rows["readout"], control="none"):
        auc = _auc(group)
        found[task] = auc[:, -max(1, auc.shape[1] // 3) :].mean(1) - 0.5
    return found


def _rises(rows: Rows) -> Samples:
    """Mean AUCROC of the deep half of the layers less that of the other: above 0 where R_l passes one half beyond the middle."""
    found = {}
    for task, group in _groups(rows["readout"], control="none"):
        auc = _auc(group)
        half = auc.shape[1] // 2
        found[task] = auc[:, -half:].mean(1) - auc[:, :half].mean(1)
    return found


def _pooled(control: str) -> Callable[[Rows], Samples]:
    """AUCROC over all prompts less that within seeds, mean over the last third of the layers: what pooling adds."""

    def effect(rows: Rows) -> Samples:
        found = {}
        for task, group in _groups(rows["readout"], control=control):
            pooled, within = pooled_samples(group)
            third = max(1, pooled.shape[1] // 3)
            found[task] = (pooled - within)[:, -third:].mean(1)
        return found

    return effect


def _more_shots(rows: Rows) -> Samples:
    """Accuracy with one shot less that with more, on prompts that both have."""
    found = {}
    own = rows["classify"]
    for task, group in _groups(own[own["metric"] == "accuracy"]):
        named = group.assign(condition=np.where(group["shots"] == 1, "one", "more"))
        wide = named.pivot_table(index=["seed", "number"], columns="condition", values="value").dropna()
        weights = resampling(wide.index.to_frame(index=False), RESAMPLES)
        found[task] = weights @ (wide["one"] - wide["more"]).to_numpy() / weights.sum(1)
    return found


def _keys(rows: Rows) -> Samples:
    """Rank correlation of foretold and actual confusion. Its resamples are not kept: three numbers stand for the interval."""
    _, told = diagnosis_summary(rows["diagnose"])
    row = told[told["condition"] == "components-10"].iloc[0]
    return {str(row["task"]): np.array([row["correlation"], row["low"], row["high"]], float)}


def _override(metric: str, shots: int | None = None) -> Callable[[Rows], Samples]:
    """At the most shots: answers that follow permuted labels less those that stay true; or how many more follow than with one shot."""

    def effect(rows: Rows) -> Samples:
        found: dict[str, dict[int, pd.DataFrame]] = {}
        for (task, n, control), own in follows(rows["classify"]):
            if control == "permuted-labels":
                found.setdefault(task, {})[int(n)] = own
        made = {}
        for task, by in found.items():
            most = by[max(by)]
            value = (
                most["shown"] - most["true"]
                if metric == "override"
                else (most["shown"] - by[1]["shown"]).dropna()
            )
            weights = resampling(value.index.to_frame(index=False), RESAMPLES)
            made[task] = weights @ value.to_numpy() / weights.sum(1)
        return made

    return effect


def _follow(rows: Rows) -> tuple[list[tuple[str, pd.DataFrame]], dict[str, dict[str, np.ndarray]]]:
    groups = _groups(rows["causal"])
    found: dict[str, dict[str, np.ndarray]] = {}
    for task, group in groups:
        size = group[group["metric"] == "follow_denominator"].set_index(["seed", "number"])["value"]
        weights = resampling(size.index.to_frame(index=False), RESAMPLES)
        found[task] = {}
        for condition in ("label", "random"):
            own = group[(group["metric"] == "follow_numerator") & (group["condition"] == condition)]
            wide = (
                own.pivot(index=["seed", "number"], columns="layer", values="value")
                .loc[size.index]
                .sort_index(axis=1)
            )
            found[task][condition] = ratio(weights, wide.to_numpy(), size.to_numpy())
    return groups, found


def _carried(rows: Rows) -> Samples:
    """Follow of label words less that of random positions, mean over the first third of the layers."""
    made = {}
    for task, both in _follow(rows)[1].items():
        third = max(1, (both["label"].shape[1] - 1) // 3)
        made[task] = (both["label"] - both["random"])[:, :third].mean(1)
    return made


def _released(rows: Rows) -> Samples:
    """Pearson's correlation over the layers of what label words release and the mean S_pq; prompts of the patch are resampled."""
    made = {}
    flows = dict(_groups(rows["flow"]))
    for task, both in _follow(rows)[1].items():
        released = -np.diff(both["label"], axis=1)
        own = flows[task]
        s_pq = own[own["metric"] == "s_pq"].groupby("layer")["value"].mean().sort_index().to_numpy()
        made[task] = np.array([np.corrcoef(r, s_pq)[0, 1] for r in released])
    return made


PAPER = "Wang et al. 2023"
FINDINGS = (
    Finding("flow, early", "S_wp is above S_pq in the first third of the layers", PAPER, "figure3", _flow({"s_wp": 1, "s_pq": -1}, "first")),
    Finding("flow, late", "S_pq is above S_wp in the last third", PAPER, "figure3", _flow({"s_pq": 1, "s_wp": -1}, "last")),
    Finding("flow, early (TREC)", "likewise on TREC", PAPER, "figure7", _flow({"s_wp": 1, "s_pq": -1}, "first")),
    Finding("flow, late (TREC)", "likewise on TREC", PAPER, "figure7", _flow({"s_pq": 1, "s_wp": -1}, "last")),
    Finding("isolation, answer", "label words isolated in the first 5 layers change the answer more than random words do (label loyalty)", PAPER, "figure4", _gap("isolate", "label_loyalty", "first-5/random", "first-5/label")),
    Finding("isolation, words", "likewise the most probable words (word loyalty)", PAPER, "figure4", _gap("isolate", "word_loyalty", "first-5/random", "first-5/label")),
    Finding("isolation, skill", "… and take the skill away (accuracy)", PAPER, "figure4", _gap("isolate", "accuracy", "none", "first-5/label")),
    Finding("random states", "random hidden states in the place of anchors lower accuracy", PAPER, "table2", _gap("compress", "accuracy", "none", "hidden_random")),
    Finding("more shots", "more shots lose points (5; AG News: 3)", PAPER, "table1", _more_shots),
    Finding("keys", "keys foretell confusion (rank correlation)", PAPER, "figure6", _keys),
    Finding("unrelated labels", "A and B are anchors, too: isolated they change more words than random words do", PAPER, "figure12", _gap("isolate", "word_loyalty", "first-5/random", "first-5/label")),
    Finding("readout", "AUCROC is above one half in the last third", PAPER, "figure5", _deep),
    Finding("R", "R_l rises beyond the middle: the deep half of the layers tells more", PAPER, "figure5", _rises),
    Finding("re-weighting", "re-weighting gains accuracy over 1 shot", PAPER, "table1", _gap("reweight", "accuracy", "reweighted", "none")),
    Finding("anchors", "hidden anchors keep more answers than random hidden states (label loyalty)", PAPER, "table2", _gap("compress", "label_loyalty", "hidden_anchor", "hidden_random")),
    Finding("hidden, not text", "… and than anchors as text", PAPER, "table2", _gap("compress", "label_loyalty", "hidden_anchor", "text_anchor")),
    Finding("patch, carried", "patched label words carry the answer in the first third, random positions do not", "ours", "patching", _carried),
    Finding("patch, released", "label words release the answer where S_pq is large (correlation)", "ours", "patching", _released),
    Finding("chat, early", "in a chat, too, S_wp is above S_pq in the first third of the layers", "ours", "chat", _flow({"s_wp": 1, "s_pq": -1}, "first")),
    Finding("chat, late", "… and S_pq above S_wp in the last third", "ours", "chat", _flow({"s_pq": 1, "s_wp": -1}, "last")),
    Finding("chat, skill", "… and label words isolated in the first 5 layers take the skill away (accuracy)", "ours", "chat", _gap("isolate", "accuracy", "none", "first-5/label")),
    Finding("order", "an AUC pooled over orders of the same demonstrations exceeds that within one", "Lu et al. 2022", "order", _pooled("order-only")),
    Finding("override", "with 8 shots of permuted labels more answers follow them than stay true", "Wei et al. 2023", "override", _override("override")),
    Finding("override, shots", "… and more follow than with 1 shot", "Wei et al. 2023", "override", _override("shown")),
    Finding("S_pq, shots", "with 4 shots S_pq's share in the last third is smaller than with 1", "Min et al. 2022", "flow-shots", _shots("s_pq", -1)),
    Finding("evenness, shots", "… and label words share in it more evenly", "Min et al. 2022", "flow-shots", _shots(ENTROPY, 1)),
)  # fmt: skip


def verdict(signs: Sequence[tuple[str, int]]) -> str:
    """Over the sizes.

    Args:
        signs: by model from the smallest on, 1 where the finding holds, -1 where it is reversed, 0 where neither is shown.
    """
    if len(signs) < 2:
        return ""
    held = [sign > 0 for _, sign in signs]
    if all(held):
        return "at every size"
    first = held.index(True) if any(held) else None
    if first is None:
        return "nowhere"
    return f"from {signs[first][0]} on" if all(held[first:]) else "mixed"


def read(root: Path, experiment: str) -> dict[str, Rows]:
    """Of every model in `SIZES` the rows of an experiment, those with the most prompts."""
    found: dict[str, tuple[Rows, int]] = {}
    for folder in (root / experiment, *sorted((root / experiment).glob("*/"))):
        rows, model = {}, ""
        for file in folder.glob("*.parquet"):
            if not file.stem.startswith(experiment):
                rows[file.stem], facts = read_table(file)
                model = titled(str(facts["model"]))
        name = next((own for own in SIZES if model.lower().startswith(own.lower())), None)
        if name is None:
            continue
        count = min(len(own[["seed", "number"]].drop_duplicates()) for own in rows.values())
        if name not in found or count > found[name][1]:
            found[name] = rows, count
    return {name: rows for name, (rows, _) in found.items()}


def _row(finding: Finding, samples: np.ndarray, **facts: Any) -> dict[str, Any]:
    value, low, high = (
        samples if finding.effect is _keys else (float(x[0]) for x in interval(samples[:, None]))
    )
    wide = widened(value, low, high, len(FINDINGS))
    sign = 0 if facts["examples"] < FEWEST else int(wide[0] > 0) - int(wide[1] < 0)
    span = {"value": value, "low": low, "high": high, "wide_low": wide[0], "wide_high": wide[1]}
    return {"finding": finding.name, **facts, **span, "sign": sign}


def _difference(finding: Finding, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of one effect less another; the resamples of two models are drawn apart."""
    if finding.effect is not _keys:
        return one - other
    gap = one[0] - other[0]
    return np.array(
        [
            gap,
            gap - np.hypot(one[0] - one[1], other[2] - other[0]),
            gap + np.hypot(one[2] - one[0], other[0] - other[1]),
        ]
    )


def _told(finding: Finding, measured: dict[str, Rows]) -> list[dict[str, Any]]:
    """A finding by model and task, and as the difference of the models of `GROWTH`."""
    made = []
    means: dict[float, tuple[np.ndarray, int, int]] = {}
    for name, rows in measured.items():
        samples, size = finding.effect(rows), SIZES[name]
        main = next(own for own in rows.values() if len(own))
        units = main[main["number"] >= 0].drop_duplicates(["task", "seed", "number"])
        counts, seeds = units.groupby("task").size(), int(units["seed"].nunique())
        every = {**samples, "mean": np.mean(list(samples.values()), 0)} if samples else {}
        for task, own in every.items():
            n = int(counts.mean()) if task == "mean" else int(counts.get(task, 0))
            made.append(_row(finding, own, model=TITLES[size], size=size, task=task, examples=n, seeds=seeds))
            if task == "mean":
                means[size] = own, n, seeds
    if {*GROWTH} <= {*means}:
        (one, n, seeds), (other, m, more) = (means[size] for size in reversed(GROWTH))
        gap = _difference(finding, one, other)
        fewest = {"examples": min(n, m), "seeds": min(seeds, more)}
        made.append(_row(finding, gap, model=GROWN, size=None, task="mean", **fewest))
    return made


def effects(root: Path) -> pd.DataFrame:
    """Every finding on every model whose rows are there, and how much more of it the larger of `GROWTH` has.

    Returns:
        One row per finding, model and task (`mean`: over the tasks): value, low, high (of it alone), `wide_low`, `wide_high` (of
        all findings at once), sign, examples (of a task on average), seeds, size in billions of parameters (none for `GROWN`).
    """
    made = []
    for experiment, findings in groupby(FINDINGS, lambda finding: finding.experiment):
        measured = read(root, experiment)
        made += [row for finding in findings for row in _told(finding, measured)]
    return pd.DataFrame(made).astype({"size": float})


def table(found: pd.DataFrame) -> str:
    """The findings as Markdown, a column a size; a cell that holds is bold, one that is reversed has a ⁻."""
    mean = found[found["task"] == "mean"].set_index(["finding", "model"])
    models = [TITLES[size] for size in sorted(found["size"].dropna().unique())]
    columns = models + [GROWN] * (GROWN in set(found["model"]))
    lines = [
        "| | the finding | source | " + " | ".join(columns) + " | verdict |",
        "|---|---|---|" + "---|" * (len(columns) + 1),
    ]
    for finding in FINDINGS:
        cells = []
        for model in columns:
            if (finding.name, model) not in mean.index:
                cells.append("")
                continue
            row = mean.loc[(finding.name, model)]
            said = estimate(row["value"], row["low"], row["high"], signed=True)
            mark = f"**{said}**" if row["sign"] > 0 else said + " ⁻" * int(row["sign"] < 0)
            cells.append(
                mark if model == GROWN else f"{mark} (n = {row['examples'] // row['seeds']} × {row['seeds']})"
            )
        signs = [
            (model.rsplit(" ", 1)[-1], int(mean.loc[(finding.name, model), "sign"]))
            for model in models
            if (finding.name, model) in mean.index
        ]
        lines.append(
            f"| {finding.name} | {finding.claim} | {finding.source} | "
            + " | ".join([*cells, verdict(signs)])
            + " |"
        )
    return "\n".join(lines)


def depths(root: Path) -> pd.DataFrame:
    """Where along the depth of a model things happen, from the rows of Figures 3, 7 and 5.

    Returns:
        A row per model: `leads`, by task the first layer from which on S_pq is above S_wp up to the layer before the last, `peak` of the
        mean AUCROC_l, and `half`, the first layer where the mean R_l passes one half; `layers`: how many there are.
    """
    made = []
    flows = [read(root, figure) for figure in ("figure3", "figure7")]
    for name, rows in read(root, "figure5").items():
        auc = readout_summary(rows["readout"])
        mean = auc[auc["task"] == "mean"].pivot_table(index="layer", columns="metric", values="value")
        found = {"model": TITLES[SIZES[name]], "layers": len(mean), "peak": int(mean["aucroc"].idxmax())}
        found["half"] = int((mean["r"] > 0.5).idxmax())
        for flow in flows:
            for task, own in flow_summary(flow[name]["flow"]).groupby("task"):
                wide = own.pivot_table(index="layer", columns="metric", values="share")
                behind = wide.index[:-1][(wide["s_pq"] <= wide["s_wp"]).to_numpy()[:-1]]
                found[f"leads, {task}"] = int(behind.max()) + 1 if len(behind) else 0
        made.append(found)
    return pd.DataFrame(made)


def depth_table(found: pd.DataFrame) -> str:
    """The layers and their share of the depth as Markdown, a column a size."""
    heads = [
        f"{model}, {layers} layers" for model, layers in zip(found["model"], found["layers"], strict=True)
    ]
    lines = ["| layer (share of the depth) | " + " | ".join(heads) + " |"]
    lines.append("|---|" + "---|" * len(found))
    said = {
        "peak": "AUCROC_l, mean of tasks, is largest at",
        "half": "R_l, mean of tasks, passes one half at",
    }
    for column in [name for name in found if name.startswith("leads")] + list(said):
        words = said.get(column, f"S_pq {column.replace('leads', 'leads from')}".replace(", ", " (") + ")")
        cells = [
            f"{layer} ({layer / layers:.2f})".replace("(0.", "(.")
            for layer, layers in zip(found[column], found["layers"], strict=True)
        ]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _between(page: str, marks: tuple[str, str], told: str) -> str:
    before, rest = page.split(marks[0])
    return f"{before}{marks[0]}\n\n{told}\n\n{marks[1]}{rest.split(marks[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        type=Path,
        help="folder of results, one folder an experiment, other models in folders below",
    )
    parser.add_argument(
        "--page", type=Path, help="a Markdown page: what stands between its marks is replaced by the table"
    )
    asked = parser.parse_args()
    found = effects(asked.results)
    from anchors.figures.scale import draw
    from anchors.figures.style import write_figure

    facts = {"model": ", ".join(TITLES.values()), "findings": len(FINDINGS)}
    write_table(asked.results / "scale" / "scale.parquet", found, facts)
    write_figure(draw(found, [f.name for f in FINDINGS]), asked.results / "scale" / "scale.png")
    told, deep = table(found), depth_table(depths(asked.results))
    if asked.page:
        text = _between(_between(asked.page.read_text(encoding="utf-8"), MARKS, told), DEPTH, deep)
        write_atomic(asked.page, lambda draft: draft.write_text(text, encoding="utf-8"))
    print(told, deep, sep="\n\n")


if __name__ == "__main__":
    main()
