"""Tables of classification, compression, speed, re-weighting, single prompts and single words."""

import itertools

import numpy as np
import pandas as pd

from anchors.intervals import interval, method
from anchors.stats import GROUP, SUMS, parts_by, refuse_doubles, refuse_models, resampling, summarise
from anchors.study.registry import LOYALTIES

SPAN = ("value", "low", "high", "interval", "prompts")


def classification_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy and loss by condition, per-class scores, and the confusion matrix in counts.

    `classes`: precision, recall and F1 of every label with intervals, how these were made, and of how many prompts
    (`prompts`: those of the label for the recall, those said to be it for the precision, both for F1). `confusion`: task,
    condition, gold, predicted, prompts.
    """
    refuse_doubles(rows)
    classes, confusion = [], []
    for key, group in rows[rows["number"] >= 0].groupby([*GROUP, "condition"], sort=False):
        facts = dict(zip([*GROUP, "condition"], key, strict=True))
        labels = [m.split("/", 1)[1] for m in dict.fromkeys(group["metric"]) if m.startswith("probability/")]
        wide = group.pivot_table(index=["seed", "number"], columns="metric", values="value")
        gold, predicted = (wide[name].to_numpy().astype(int) for name in ("gold", "predicted"))
        weights = resampling(wide.index.to_frame(index=False))
        true_one_hot, said_one_hot = (np.eye(len(labels))[own] for own in (gold, predicted))
        hit = weights @ (true_one_hot * said_one_hot)
        true, said = weights @ true_one_hot, weights @ said_one_hot
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = {
                "precision": (hit / said, said[0]),
                "recall": (hit / true, true[0]),
                "f1": (2 * hit / (said + true), said[0] + true[0]),
            }
        for name, (samples, prompts) in scores.items():
            count = None if name == "f1" else prompts
            spans = (*interval(samples, count=count), method(samples, count), prompts.astype(int))
            classes += [
                facts | {"label": label, "metric": name} | dict(zip(SPAN, own, strict=True))
                for label, *own in zip(labels, *spans, strict=True)
            ]
        confusion += [
            facts
            | {
                "gold": labels[i],
                "predicted": labels[j],
                "prompts": int(((gold == i) & (predicted == j)).sum()),
            }
            for i, j in itertools.product(range(len(labels)), repeat=2)
        ]
    return {
        "summary": summarise(rows, ("accuracy", "loss"), baseline="none"),
        "classes": pd.DataFrame(classes),
        "confusion": pd.DataFrame(confusion),
    }


def reduced(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of compression with the draws of random tokens reduced to two conditions.

    `hidden_random` is the mean over draws, `hidden_random_top` the draw of each task and seed with the best label
    loyalty (draws of different seeds have nothing to do with each other).
    """
    refuse_doubles(rows)
    draws = rows["condition"].str.startswith("hidden_random/")
    if not draws.any():
        return rows
    own = rows[draws & rows["metric"].isin([*LOYALTIES, "loss"])]
    names = [*GROUP, "model", "seed", "number", "example", "metric"]
    mean = own.groupby(names, as_index=False, sort=False)["value"].mean()
    loyal = own[own["metric"] == "label_loyalty"].groupby([*GROUP, "seed", "condition"])["value"].mean()
    best = loyal.groupby([*GROUP, "seed"]).idxmax()
    top = own[pd.MultiIndex.from_frame(own[[*GROUP, "seed", "condition"]]).isin(list(best))]
    parts = [rows[~draws], mean.assign(condition="hidden_random"), top.assign(condition="hidden_random_top")]
    return pd.concat(parts, ignore_index=True)


def compression_sizes(rows: pd.DataFrame) -> pd.DataFrame:
    """L_demo, L_x, kept tokens and bytes, by task and method, means over seeds."""
    refuse_doubles(rows)
    seed_level = rows[(rows["number"] < 0) & (rows["metric"] != "prompts")]
    return seed_level.groupby([*GROUP, "condition", "metric"], as_index=False)["value"].mean()


def compression_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Loyalties and accuracy by method, see `reduced`; the label loyalty `against` that of the anchors; and the sizes."""
    every = reduced(rows)
    tables = {"summary": summarise(every, LOYALTIES, baseline="none"), "sizes": compression_sizes(rows)}
    if "hidden_anchor" in set(every["condition"]):
        tables["against"] = summarise(every, ("label_loyalty",), baseline="hidden_anchor")
    return tables


def speed_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Speed-up of compressed and of cached demonstrations over vanilla in-context learning, beside the numbers of tokens.

        tokens = (L_demo + L_x) / (L_x + anchors)

    Anchors are not run again but only attended to, so this ratio is no bound; (L_demo + L_x) / L_x is one, as far as
    time goes with the tokens that are run. `whole_cached` are whole demonstrations, run once and kept in a cache. Intervals draw
    batches, each of which was timed as a whole.
    """
    refuse_doubles(rows)
    found = []
    for key, group in parts_by(rows, GROUP):
        timed = group[(group["metric"] == "seconds") & (group["number"] >= 0)]
        wide = timed.pivot_table(index=["seed", "number"], columns="condition", values="value")
        batch = group[group["metric"] == "batch"].set_index(["seed", "number"])["value"].loc[wide.index]
        whole = wide.groupby([batch.index.get_level_values("seed"), batch.to_numpy()]).sum()
        whole.index.names = ["seed", "number"]
        weights = resampling(whole.index.to_frame(index=False))[: 1 if len(whole) == 1 else None]
        total = weights @ whole.to_numpy()
        vanilla = total[:, list(wide.columns).index("none")]
        tokens = group[group["number"] < 0].groupby("metric")["value"].mean()
        demo, own, kept = (tokens[n] for n in ("demonstration_tokens", "input_tokens", "kept_tokens"))
        for condition in wide.columns.drop("none"):
            attended = demo if condition == "whole_cached" else kept
            samples = vanilla / total[:, list(wide.columns).index(condition)]
            value, low, high = interval(samples[:, None])
            found.append(
                dict(zip(GROUP, key, strict=True))
                | {"condition": condition, "metric": "speed_up", "layer": None}
                | {"value": value[0], "low": low[0], "high": high[0]}
                | {"limit": (demo + own) / (own + attended), "bound": (demo + own) / own}
                | {"demonstration_tokens": demo, "input_tokens": own, "kept_tokens": attended}
                | {"seconds": wide[condition].mean(), "vanilla_seconds": wide["none"].mean()}
                | {"examples": len(wide), "seeds": wide.index.get_level_values("seed").nunique()}
            )
    return {"summary": pd.DataFrame(found)}


def reweighting_summary(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Accuracy and loss with and without β, and β itself: mean over seeds by layer, head and label word."""
    refuse_doubles(rows)
    beta = rows[rows["metric"].str.startswith("beta/")]
    parts = beta["metric"].str.removeprefix("beta/").str.rsplit("/", n=1, expand=True)
    table = beta.assign(label=parts[0], head=parts[1].astype(int))
    means = table.groupby([*GROUP, "label", "layer", "head"], as_index=False, sort=False)["value"].mean()
    return {"summary": summarise(rows, ("accuracy", "loss"), baseline="none"), "beta": means}


def marked(
    tables: dict[str, pd.DataFrame], rows: dict[str, pd.DataFrame], error: float | None
) -> dict[str, pd.DataFrame]:
    """Tables with differences, in which those are `indistinct` whose condition changes nothing that could be told from
    rounding: its loss differs from that of `none` by no more than twice the arithmetic error on every prompt.

    Args:
        tables: of `rows`, the main one first.
        rows: by kind of analysis.
        error: of a run (`anchors.check.arithmetic_error`), in nats; None where nobody knows it.
    """
    name, table = next(iter(tables.items()))
    if error is None or "difference" not in table:
        return tables
    loss = next(iter(rows.values()))
    loss = loss[(loss["metric"] == "loss") & (loss["number"] >= 0)]
    if "none" not in set(loss["condition"]):
        return tables
    wide = loss.pivot_table(index=[*GROUP, "seed", "number"], columns="condition", values="value")
    gap = wide.sub(wide["none"], axis=0).abs().groupby(GROUP).max()
    alike = (gap <= 2 * error).stack().rename("indistinct").reset_index()
    alike = alike[alike["condition"] != "none"]
    found = table[[*GROUP, "condition"]].merge(alike, how="left", on=[*GROUP, "condition"])["indistinct"]
    return tables | {name: table.assign(indistinct=(found == True).to_numpy())}  # noqa: E712


def map_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tokens of single prompts and the flows between them (Figure 1).

    `tokens`: position, role, text, and whether it is counted as a label word (a position p_k, which S_wp and S_pq are sums
    over). In rows that do not say, from before they did, every token of a label word is. `flows`: layer, from_, to, value.

    Raises:
        AnchorsError: rows of several models, or flows that are there several times.
    """
    refuse_models(rows)  # a token's text may stand there several times
    tokens = rows[rows["metric"].str.startswith("token/")]
    parts = tokens["metric"].str.split("/", n=2, expand=True)
    flows = rows[rows["metric"].str.startswith("flow/")]
    refuse_doubles(flows)
    ends = flows["metric"].str.split("/", expand=True)
    own = ["task", "seed", "number", "value"]
    counted = pd.MultiIndex.from_frame(rows.loc[rows["metric"] == "counted", own])
    labels = pd.MultiIndex.from_frame(tokens[own]).isin(counted) if len(counted) else parts[1] == "label"
    return {
        "tokens": tokens[["task", "seed", "example"]].assign(
            position=tokens["value"].astype(int), role=parts[1], text=parts[2], counted=labels
        ),
        "flows": flows[["task", "seed", "example", "layer", "value"]].assign(
            to=ends[1].astype(int), from_=ends[2].astype(int)
        ),
    }


def word_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The most probable next words of single prompts under each condition (Table 5)."""
    refuse_doubles(rows)
    own = rows[rows["metric"].str.startswith("word/")]
    parts = own["metric"].str.split("/", n=2, expand=True)
    kept = own[["task", "seed", "number", "example", "condition"]]
    return {"words": kept.assign(rank=parts[1].astype(int), word=parts[2], probability=own["value"])}


def flow_pattern(summary: pd.DataFrame) -> pd.DataFrame:
    """The paper's finding about the flow in numbers (Figure 3), from `flow_summary`.

    Returns:
        Per task: the mean share of each sum over the first and the last third of the layers, and the first layer
        from which S_pq stays the largest of the three up to the end (missing when it never does).
    """
    found = []
    for key, part in parts_by(summary, GROUP):
        share = part.pivot_table(index="layer", columns="metric", values="share").sort_index()
        third = len(share) // 3
        led = share["s_pq"] > share[["s_wp", "s_ww"]].max(axis=1)
        tail = led[::-1].cumprod()[::-1].astype(bool)
        found.append(
            dict(zip(GROUP, key, strict=True))
            | {"s_pq_leads_from": int(tail.idxmax()) if tail.any() else None}
            | {f"{name}_first_third": share[name].head(third).mean() for name in SUMS}
            | {f"{name}_last_third": share[name].tail(third).mean() for name in SUMS}
        )
    return pd.DataFrame(found)
