"""Synthetic rows of every analysis, for what only reads rows."""

import numpy as np
import pandas as pd

from anchors.stats import SUMS

AWKWARD = ("$a$ $", r"un_der^{\$", "\U000e0fff漢\x00\n")
"""Labels and tokens that a formula, a font or a line could stumble over."""


def rows(records, task="a", shots=1, seed=1):
    """Tidy rows from (number, condition, layer, metric, value)."""
    table = pd.DataFrame(records, columns=["number", "condition", "layer", "metric", "value"])
    facts = {"model": "m", "task": task, "shots": shots, "control": "none", "seed": seed}
    types = {"value": float, "layer": "Int64"}
    return table.astype(types).assign(**facts, example=table["number"])


def summary(tasks=("a", "b"), layers=6):
    """S_wp rules the first half of the layers, S_pq the second."""
    early = np.arange(layers) < layers // 2
    share = {
        "s_wp": np.where(early, 0.7, 0.1),
        "s_pq": np.where(early, 0.1, 0.8),
        "s_ww": np.where(early, 0.2, 0.1),
    }
    return pd.concat(
        pd.DataFrame(
            {
                "task": task, "layer": range(layers), "metric": name, "share": share[name],
                "share_low": share[name] - 0.05, "share_high": share[name] + 0.05, "examples": 9,
                "shots": 1, "control": "none",
            }
        )
        for task in tasks
        for name in SUMS
    ).reset_index(drop=True)  # fmt: skip


def classified(labels, conditions=("none", "calibrated"), prompts=12):
    rng = np.random.default_rng(0)
    found = []
    for n in range(prompts):
        for condition in conditions:
            gold, said = n % len(labels), rng.integers(len(labels))
            found += [(n, condition, None, f"probability/{label}", 1 / len(labels)) for label in labels]
            found += [(n, condition, None, "gold", gold), (n, condition, None, "predicted", said)]
            found += [(n, condition, None, "accuracy", gold == said), (n, condition, None, "loss", 1)]
    return found


def isolated(numbers=(5,), prompts=8):
    rng = np.random.default_rng(1)
    sides = [
        f"{side}-{k}/{what}" for k in numbers for side in ("first", "last") for what in ("label", "random")
    ]
    found = [(n, "none", None, "accuracy", 1) for n in range(prompts)]
    for condition in sides:
        for metric in ("accuracy", "label_loyalty", "word_loyalty"):
            found += [(n, condition, None, metric, rng.integers(2)) for n in range(prompts)]
    return found


def attended(predicted, layers=4):
    rng = np.random.default_rng(2)
    found = []
    for n, said in enumerate(predicted):
        found.append((n, "none", None, "predicted", said))
        for layer in range(layers):
            found += [(n, "none", layer, f"attention/{c}", rng.random() + (said == c)) for c in range(2)]
    return found


def reweighted(labels, layers=3, heads=2):
    accuracy = [
        (n, c, None, "accuracy", (n + (c != "none")) % 3 > 0)
        for n in range(8)
        for c in ("none", "reweighted")
    ]
    beta = [
        (-1, "reweighted", layer, f"beta/{label}/{head}", 0.1 * (layer - head) + i)
        for i, label in enumerate(labels)
        for layer in range(layers)
        for head in range(heads)
    ]
    return accuracy + [(n, c, None, "loss", v) for n, c, _, _, v in accuracy] + beta


def compressed(prompts=8):
    rng = np.random.default_rng(3)
    found = [(n, "none", None, "accuracy", 1) for n in range(prompts)]
    found.append((-1, "none", None, "demonstration_tokens", 100))
    for method in ("text_anchor", "hidden_anchor", "hidden_random/00", "hidden_random/01"):
        for metric in ("accuracy", "label_loyalty", "word_loyalty"):
            found += [(n, method, None, metric, rng.integers(2)) for n in range(prompts)]
    return found


def timed(prompts=6):
    found = [
        (n, c, None, "seconds", s + n / 9)
        for n in range(prompts)
        for c, s in (("none", 2), ("hidden_anchor", 1), ("whole_cached", 1.5))
    ]
    found += [(n, "none", None, "batch", n // 2) for n in range(prompts)]
    counts = {"demonstration_tokens": 90, "input_tokens": 10, "kept_tokens": 15}
    return found + [(-1, "none", None, name, value) for name, value in counts.items()]


def diagnosed(labels, components=(10,)):
    rng = np.random.default_rng(4)
    found = []
    for n in range(24):
        p = rng.dirichlet(np.ones(len(labels)))
        found += [(n, "none", None, f"probability/{label}", v) for label, v in zip(labels, p, strict=True)]
        found += [(n, "none", None, "gold", n % len(labels)), (n, "none", None, "predicted", p.argmax())]
    pairs = [(i, j) for i in range(len(labels)) for j in range(i)]
    for m in components:
        name = "predicted_confusion/{}/{}"
        found += [
            (-1, f"components-{m}", 2, name.format(labels[j], labels[i]), rng.random()) for i, j in pairs
        ]
    return found


def mapped(texts, roles, layers=(1, 5)):
    found = [
        (0, "none", None, f"token/{r}/{t}", i) for i, (t, r) in enumerate(zip(texts, roles, strict=True))
    ]
    count = len(texts)
    for layer in layers:
        found += [
            (0, "none", layer, f"flow/{i}/{j}", 1 / (1 + i + j + layer))
            for i in range(count)
            for j in range(i)
        ]
    return found


def aimed(words, layers=3, prompts=2, against=" no"):
    """Flow into the last of some tokens, from each of the others its number + 1 in every layer; more is the first prompt's."""
    found = []
    for n in range(prompts):
        told = {"loss": 1.5, "probability": 0.25, "predicted": 7, "tokens": len(words), "target/ yes": 8}
        told |= {f"against/{against}": 9} if n == 0 else {}
        found += [(n, "none", None, metric, value) for metric, value in told.items()]
        found += [(n, "none", None, f"token/{j}/{word}", 10 + j) for j, word in enumerate(words)]
        row = np.arange(1, len(words)) / (n + 1)
        for layer in range(layers):
            by_layer = {
                "s_tq": row.mean(),
                "s_ww": 0.5,
                "first_token": row[0] / row.sum(),
                "entropy": 1.0 + layer,
            }
            by_layer |= {f"source/{j}": value for j, value in enumerate(row)}
            found += [(n, "none", layer, metric, value) for metric, value in by_layer.items()]
    return found


def worded(words):
    return [
        (n, condition, None, f"word/{rank}/{word}", 1 / (rank + n + 1))
        for n in range(2)
        for condition in ("none", "first-5/label")
        for rank, word in enumerate(words, start=1)
    ]


def probed(prompts=4, layers=2, groups=2, heads=2):
    """Rows of `anchors nsa probe`; label words stand in every third block and are chosen more and more."""
    rng, table = np.random.default_rng(0), []

    for number in range(prompts):

        def add(
            metric, value, condition="none", layer=None, group=None, head=None, place=None, number=number
        ):
            table.append((1, number, condition, layer, group, head, place, metric, float(value)))

        add("chance", 0.25)
        for which in ("label", "answer"):
            for place in range(1, 13):
                add("label_words", place % 3 == 0, which, place=place)
        for condition in ("none", "ban-label", "ban-label-control", "isolate-control"):
            for metric in ("accuracy", "probability", "margin", "logit"):
                add(metric, rng.random(), condition)
        for layer in range(layers):
            for pair in ("wp", "pq", "ww"):
                for branch in ("cmp", "slc", "win", "all"):
                    add(f"s_{pair}", 1 + rng.random(), branch, layer)
            for group in range(groups):
                add("recall", rng.random(), layer=layer, group=group)
                for place in rng.choice(12, 3, replace=False) if layer == 0 else (3, 6, 9):
                    add("chosen", 1, layer=layer, group=group, place=int(place) + (layer == 0))
            for head in range(heads):
                for branch in ("cmp", "slc", "win"):
                    for where in ("label", "last", "other", "sd"):
                        add(f"gate_{where}", rng.random(), branch, layer, head=head)
    columns = ["seed", "number", "condition", "layer", "group", "head", "place", "metric", "value"]
    return pd.DataFrame(table, columns=columns).astype(dict.fromkeys(columns[3:7], "Int32"))
