"""Models or runs side by side: the numbers of a study that prompts have, with paired intervals where the prompts are the same.

Nothing here imports torch.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from anchors.collection import Results
from anchors.errors import AnchorsError
from anchors.intervals import interval
from anchors.places import told_apart
from anchors.stats import GROUP, PROPORTIONS, SUMS, parts_by, resampling, shares, within_seeds
from anchors.summaries.causal import ratio
from anchors.summaries.readout import aucroc, scores_of
from anchors.summaries.tables import reduced

KINDS = ("flow", "classify", "isolate", "readout", "reweight", "compress", "causal", "diagnose", "nsa_probe")
"""Studies whose numbers can be compared."""
MEANS = ("accuracy", "label_loyalty", "word_loyalty", "loss")
CHAT = re.compile(r" \((chat(?:, one turn)?(?:, system)?)\)$")
"""How the name of a task ends whose prompts went through a chat template: `anchors.tasks.task.Task.called`."""
PROMPT = ["seed", "number", "example"]


def labels_of(found: Sequence[Results]) -> list[str]:
    """What tells the runs apart: the model, by its title, and what differs of chat, precision and folder where models are the same."""
    titles = told_apart(str(own.facts["model"]) for own in found)
    told = [
        [titles[str(own.facts["model"])], _chat(own), str(own.facts.get("precision") or ""), own.folder.name]
        for own in found
    ]
    labels = [parts[0] for parts in told]
    for column in (1, 2, 3):
        labels = [
            f"{label}, {parts[column]}" if labels.count(label) > 1 and parts[column] else label
            for label, parts in zip(labels, told, strict=True)
        ]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: i + 1].count(label)})"
        for i, label in enumerate(labels)
    ]


def _chat(own: Results) -> str:
    """What the tasks' names say of a chat, nothing where prompts are plain."""
    return ", ".join(dict.fromkeys(word for name in own.tasks for word in CHAT.findall(name)))


def compared(found: Sequence[Results]) -> pd.DataFrame:
    """The numbers of every run, and how far they are from the first run's.

    Numbers of prompts are means over prompts. Of the flow they are the mean shares of the three sums in the first and the last
    third of the layers, of `readout` the mean AUCROC there, of `causal` the mean of how far the answer follows there. Two runs
    are compared in pairs on the prompts that both have: the same text, drawn by the same seed after the same demonstrations
    (same template, labels, data, shots and control). Whether they go through a chat template is what may differ.

    Args:
        found: results of one kind, two or more.

    Returns:
        One row per task, shots, control, run and number (condition, metric): value, low, high, examples (of the run); difference
        to the first run with its interval, and `shared`, the prompts that it rests on; missing where there are none.

    Raises:
        AnchorsError: fewer than two runs, or of several kinds; rows without such numbers.
    """
    kinds = {own.kind for own in found}
    if len(found) < 2 or len(kinds) > 1 or not kinds <= {*KINDS}:
        raise AnchorsError(
            f"{len(found)} results of {', '.join(sorted(kinds))} cannot be compared.",
            f"Name at least two runs of one of {', '.join(KINDS)}.",
            code="rows",
        )
    kind, labels = kinds.pop(), labels_of(found)
    parts = [_parts(own, kind) for own in found]
    tables = []
    for key in dict.fromkeys(key for own in parts for key in own):
        first = parts[0].get(key)
        for number, (label, own) in enumerate(zip(labels, parts, strict=True)):
            if key not in own:
                continue
            rows, asked = own[key]
            table = _estimates(_samples(kind, rows))
            if number and first is not None and asked is not None and asked == first[1]:
                table = table.join(_differences(kind, rows, first[0]), on=["condition", "metric"])
            tables.append(table.assign(**dict(zip(GROUP, key, strict=True)), run=label))
    if not tables:
        raise AnchorsError("These rows hold no numbers of prompts.", "Measure again.", code="rows")
    table = pd.concat(tables, ignore_index=True)
    columns = [*GROUP, "condition", "metric", "run", "value", "low", "high", "examples"]
    return table.reindex(columns=[*columns, "difference", "difference_low", "difference_high", "shared"])


def _parts(own: Results, kind: str) -> dict[tuple, tuple[pd.DataFrame, Any]]:
    """By task, shots and control: rows, and all that the prompts depend on beside seed and number; None where nobody knows it."""
    rows = own.rows[kind]
    rows = reduced(rows) if kind == "compress" else rows
    rows = rows if set(GROUP) <= set(rows) else rows.assign(task="episodes", shots=0, control="none")
    asked: dict[tuple, list[Any]] = {}
    parts = [p for p in own.facts.get("parts") or () if isinstance(p, dict) and p.get("kind", kind) == kind]
    names = list(dict.fromkeys(rows["task"]))
    rows = rows.assign(task=rows["task"].map(lambda name: CHAT.sub("", name)))
    each = len(parts) // len(names) if len(names) and len(parts) % len(names) == 0 else 0
    for number, part in enumerate(parts):
        if "data" in part and (each == 1 or "called" in part):
            # Parts that do not say their task's name come in the order of the tasks, one for each.
            (name,) = part.get("called") or (names[number],)
            same = {k: part.get(k) for k in ("task", "data", "shots", "control", "fresh")}
            if isinstance(same["task"], dict):
                same["task"] = {k: v for k, v in same["task"].items() if k != "chat"}
            asked.setdefault((CHAT.sub("", name), part["shots"], part["control"]), []).append(same)
    found = {}
    for key, group in parts_by(rows[rows["number"] >= 0], GROUP):
        known = asked.get((key[0], int(key[1]), key[2]), [])
        found[key] = group, known[0] if len(known) == 1 else None
    return found


def _samples(kind: str, rows: pd.DataFrame) -> tuple[pd.MultiIndex, np.ndarray, pd.DataFrame]:
    """Numbers by condition and metric, [1 + resamples, numbers], and the prompts. The same prompts are resampled alike."""
    units = rows[PROMPT[:2]].drop_duplicates().sort_values(PROMPT[:2], ignore_index=True)
    weights = resampling(units)[: 1 if len(units) == 1 else None]
    make = {"flow": _flow, "readout": _readout, "causal": _causal}.get(kind, _means)
    found = {name: np.asarray(own, float) for name, own in make(rows, units, weights).items()}
    index = pd.MultiIndex.from_tuples(list(found), names=["condition", "metric"])
    return index, np.stack(list(found.values()), 1) if found else np.zeros((len(weights), 0)), units


def _estimates(made: tuple[pd.MultiIndex, np.ndarray, pd.DataFrame]) -> pd.DataFrame:
    index, samples, units = made
    binary = np.array([metric in PROPORTIONS for _, metric in index], bool)
    value, low, high = interval(samples, count=np.where(binary, len(units), np.nan))
    return index.to_frame(index=False).assign(value=value, low=low, high=high, examples=len(units))


def _differences(kind: str, rows: pd.DataFrame, first: pd.DataFrame) -> pd.DataFrame:
    """How far a run's numbers are from the first one's, on the prompts that both have."""
    shared = rows[PROMPT].drop_duplicates().merge(first[PROMPT].drop_duplicates())
    columns = ["difference", "difference_low", "difference_high", "shared"]
    if not len(shared):
        return pd.DataFrame(
            columns=columns, index=pd.MultiIndex.from_arrays([[], []], names=["condition", "metric"])
        )
    (index, own, _), (other_index, other, _) = (
        _samples(kind, table.merge(shared)) for table in (rows, first)
    )
    both = index.intersection(other_index, sort=False)
    gap = own[:, index.get_indexer(both)] - other[:, other_index.get_indexer(both)]
    values = dict(zip(columns, (*interval(gap), np.full(len(both), len(shared))), strict=True))
    return pd.DataFrame(values, index=both)


def _wide(rows: pd.DataFrame, units: pd.DataFrame, columns: str | list[str]) -> pd.DataFrame:
    """Values of the prompts, in their order, by some columns."""
    wide = rows.pivot_table(index=PROMPT[:2], columns=columns, values="value")
    return wide.reindex(pd.MultiIndex.from_frame(units))


def _means(rows: pd.DataFrame, units: pd.DataFrame, weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    own = rows[rows["metric"].isin(MEANS)]
    if not (own["metric"] == "accuracy").any() and {"gold", "predicted"} <= set(rows["metric"]):
        wide = rows[rows["metric"].isin(["gold", "predicted"])].pivot_table(
            index=[*PROMPT[:2], "condition"], columns="metric", values="value"
        )
        own = (
            (wide["gold"] == wide["predicted"])
            .astype(float)
            .rename("value")
            .reset_index()
            .assign(metric="accuracy")
        )
    wide = _wide(own, units, ["condition", "metric"])
    data = wide.to_numpy(float)
    known = ~np.isnan(data)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(known, data, 0)) / (weights @ known)
    return {(str(c), str(m)): means[:, i] for i, (c, m) in enumerate(wide.columns)}


def _thirds(layers: int) -> dict[str, slice]:
    third = max(1, layers // 3)
    return {"first third": slice(None, third), "last third": slice(-third, None)}


def _flow(rows: pd.DataFrame, units: pd.DataFrame, weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    wide = _wide(rows[rows["metric"].isin(SUMS)], units, ["metric", "layer"])
    layers = sorted(set(wide.columns.get_level_values("layer")))
    data = np.stack([wide[name][layers].to_numpy(float) for name in SUMS], 1)  # prompts, sums, layers
    share = shares(np.einsum("re,esl->srl", weights / weights.sum(1, keepdims=True), data))
    return {
        (end, f"share of {name.capitalize()}"): share[i][:, part].mean(1)
        for end, part in _thirds(len(layers)).items()
        for i, name in enumerate(SUMS)
    }


def _readout(
    rows: pd.DataFrame, units: pd.DataFrame, weights: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    scores, predicted, own = scores_of(rows)
    order = pd.MultiIndex.from_frame(own[PROMPT[:2]]).get_indexer(pd.MultiIndex.from_frame(units))
    scores, predicted = scores[order], predicted[order]
    auc = within_seeds(units, weights, lambda at, w: aucroc(scores[at], predicted[at], w))
    return {(end, "AUCROC"): auc[:, part].mean(1) for end, part in _thirds(auc.shape[1]).items()}


def _causal(
    rows: pd.DataFrame, units: pd.DataFrame, weights: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    size = _wide(rows[rows["metric"] == "follow_denominator"], units, "metric")["follow_denominator"]
    found = {}
    for condition, own in rows[rows["metric"] == "follow_numerator"].groupby("condition", sort=False):
        follow = ratio(weights, _wide(own, units, "layer").to_numpy(float), size.to_numpy(float))
        for end, part in _thirds(follow.shape[1]).items():
            found[f"{condition}, {end}", "follow"] = follow[:, part].mean(1)
    return found
