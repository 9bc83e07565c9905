"""What the tables of a study say, in one or two sentences of each task.

A verdict falls only after correction for all intervals that it looks at (layers, conditions), and never on fewer than `FEWEST`
prompts. Differences between two rows of a table are bounded by both rows' own intervals, as if these were not paired: that is
cautious.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from anchors.intervals import estimate, widened
from anchors.stats import GROUP, parts_by
from anchors.summaries.diagnosis import FEWEST, sentence


class Span(NamedTuple):
    """An estimate and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return estimate(*self)

    def __sub__(self, other: "Span") -> "Span":
        return Span(self.value - other.value, self.low - other.high, self.high - other.low)

    def widened(self, tests: int) -> "Span":
        """The same with all of `tests` such intervals right at once."""
        return Span(self.value, *widened(*self, tests))

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval lies above or below 0."""
        return int(self.low > 0) - int(self.high < 0)


def span(row: Any, name: str = "value") -> Span:
    """A row's estimate of this name; the bounds of a table's main one have no name before them."""
    low, high = (f"{name}_low", f"{name}_high") if f"{name}_low" in row else ("low", "high")
    return Span(*(float("nan") if pd.isna(row[n]) else float(row[n]) for n in (name, low, high)))


def mean(spans: Sequence[Span]) -> Span:
    """Of several estimates, bounded by the means of their bounds."""
    return Span(*(sum(own) / len(spans) for own in zip(*spans, strict=True)))


def judged(signs: Iterable[int], finding: str, n: int, tests: int = 1, *, paper: bool = True) -> str:
    """The verdict: met where every sign is 1, not met where one is -1.

    Args:
        signs: of what the finding says is above 0.
        finding: in a few words.
        n: prompts.
        tests: intervals that were corrected for.
        paper: whether it is the paper's finding; else a question of ours.
    """
    signs = list(signs)
    called = f"the paper's finding ({finding})" if paper else f"that {finding}"
    counted = f"n = {n}" + (f"; corrected for {tests} comparisons" if tests > 1 else "")
    if n < FEWEST:
        return f"Undecided: {n} prompts are too few for a verdict on {called}."
    if signs and all(sign > 0 for sign in signs):
        return (
            f"The paper's finding ({finding}) is met here" if paper else f"Shown here: {finding}"
        ) + f" ({counted})."
    if any(sign < 0 for sign in signs):
        return (
            f"The paper's finding ({finding}) is not met here" if paper else f"Excluded here: {finding}"
        ) + f" ({counted})."
    return f"Undecided: these numbers neither show nor exclude {called} ({counted})."


class Part(NamedTuple):
    """What was measured together: one task, number of shots and control.

    Attributes:
        name: in words.
        table: its rows.
        n: prompts.
        plain: whether nothing was permuted: a control is to show nothing, and gets no verdict.
    """

    name: str
    table: pd.DataFrame
    n: int
    plain: bool


def parts(table: pd.DataFrame) -> Iterator[Part]:
    """By task, shots and control."""
    several = table["shots"].nunique() > 1
    for (task, shots, control), own in parts_by(table, GROUP):
        name = "mean over tasks" if task == "mean" else str(task)
        name += f", {shots} shot{'s' * (shots != 1)}" if several else ""
        name += f", {control}" if control != "none" else ""
        yield Part(name, own, int(own["examples"].iloc[0]), control == "none")


def _said(part: Part, told: str, verdict: str) -> str:
    return f"{part.name}: {told}" + (
        f" {verdict}" if part.plain else " This is a control: it must show nothing."
    )


def _counted(layers: Iterable[Any]) -> str:
    """How many layers there are rows of; where numbers are left out, these have no attention."""
    own = sorted(map(int, layers))
    return f"{len(own)} {'attention ' * (own != list(range(len(own))))}layers"


def flow(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """S_wp in the first third of the layers, S_pq in the last."""
    found = []
    for part in parts(tables["summary"]):
        rows = part.table.set_index(["metric", "layer"])
        layers = sorted(part.table["layer"].unique())
        third = max(1, len(layers) // 3)
        ends = {"early": layers[:third], "late": layers[-third:]}
        own, wide = (
            {
                (metric, end): mean([span(rows.loc[(metric, x)], "share").widened(tests) for x in chosen])
                for metric in ("s_wp", "s_pq")
                for end, chosen in ends.items()
            }
            for tests in (1, 4 * third)
        )
        signs = [
            (wide["s_wp", "early"] - wide["s_pq", "early"]).sign,
            (wide["s_pq", "late"] - wide["s_wp", "late"]).sign,
        ]
        told = (
            f"in the first {third} of {_counted(layers)} S_wp is {own['s_wp', 'early']} of the flow and S_pq "
            f"{own['s_pq', 'early']}, in the last {third} S_wp is {own['s_wp', 'late']} and S_pq {own['s_pq', 'late']}."
        )
        found.append(_said(part, told, judged(signs, "S_wp early, S_pq late", part.n, 4 * third)))
    return found


def classify(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Accuracy against always naming the most frequent class."""
    found = []
    for part in parts(tables["summary"]):
        row = _row(part.table, "none", "accuracy")
        if row is None or pd.isna(row.get("majority")):
            continue
        most = float(row["majority"])
        above = span(row) - Span(most, most, most)
        told = f"accuracy is {span(row)}; always naming the most frequent class gives {estimate(most, None, None)}."
        verdict = judged([above.sign], "the model does better than that", part.n, paper=False)
        found.append(_said(part, told, verdict))
    return found


def isolate(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Label words cut off in the first layers, against random positions there and label words in the last layers."""
    found = []
    for part in parts(tables["summary"]):
        conditions = set(part.table["condition"])
        depths = sorted({int(m[1]) for c in conditions if (m := re.fullmatch(r"first-(\d+)/label", c))})
        if not depths:
            continue
        k = depths[-1]
        names = {
            f"label words isolated in the first {k} layers": f"first-{k}/label",
            "as many random positions there": f"first-{k}/random",
            f"label words in the last {k}": f"last-{k}/label",
        }
        names = {said: c for said, c in names.items() if c in conditions}
        tests = len(depths) * len(names)
        spans = {c: span(_row(part.table, c, "word_loyalty")) for c in names.values()}
        first, *others = (own.widened(tests) for own in spans.values())
        told = "; ".join(f"{said} leave {spans[c]} of the top words" for said, c in names.items())
        change = span(_row(part.table, f"first-{k}/label", "accuracy"), "difference")
        told += f"; accuracy changes by {estimate(*change, signed=True)} in the first case."
        signs = [(other - first).sign for other in others]
        found.append(
            _said(part, told, judged(signs, "label words in the first layers matter most", part.n, tests))
        )
    return found


def readout(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The AUCROC of deep layers, against guessing and against the paper's .8."""
    found = []
    for part in parts(tables["summary"]):
        own = part.table[part.table["metric"] == "aucroc"].dropna(subset=["value"]).sort_values("layer")
        if not len(own):
            found.append(f"{part.name}: {part.table['note'].iloc[0]}.")
            continue
        count = len(own)
        deep = {
            int(row["layer"]): span(row).widened(count) for row in own.tail(count // 2 + 1).to_dict("records")
        }
        best = max(deep, key=lambda layer: deep[layer].value)
        guess, paper = Span(0.5, 0.5, 0.5), Span(0.8, 0.8, 0.8)
        above = [layer for layer, wide in deep.items() if (wide - guess).sign > 0]
        below = all((wide - paper).sign < 0 for wide in deep.values())
        told = (
            f"among the {len(deep)} deepest of {_counted(own['layer'])}, attention to the label words foretells the prediction best in layer {best}: "
            f"AUCROC {span(own.set_index('layer').loc[best])} (.5 is guessing); "
            + (
                f"it is surely above guessing in {len(above)} of them"
                if above
                else "in none of them is it surely above guessing"
            )
            + ("; all lie below the paper's .8." if below else ".")
        )
        signs = [1 if above else -1 if below else 0]
        found.append(_said(part, told, judged(signs, "deep layers read the label words", part.n, count)))
    return found


def reweight(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """The gain of accuracy by β."""
    found = []
    for part in parts(tables["summary"]):
        row, before = (_row(part.table, c, "accuracy") for c in ("reweighted", "none"))
        if row is None or before is None:
            continue
        gain = span(row, "difference")
        told = (
            f"re-weighting changes accuracy by {estimate(*gain, signed=True)}, from {span(before)} to {span(row)} "
            "(the paper: +.17 on average over its tasks)."
        )
        found.append(_said(part, told, judged([gain.sign], "re-weighting gains accuracy", part.n)))
    return found


def compress(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Loyalty of the anchors against text and random tokens, and against the whole demonstrations kept in a cache."""
    found = []
    for part in parts(tables["summary"]):
        spans = {
            c: span(row)
            for c in ("hidden_anchor", "hidden_random", "text_anchor")
            if (row := _row(part.table, c, "label_loyalty")) is not None
        }
        if "hidden_anchor" not in spans:
            continue
        apart = [
            _row(_like(tables["against"], part.table.iloc[0]), c, "label_loyalty") for c in list(spans)[1:]
        ]
        signs = [-span(row, "difference").widened(len(apart)).sign for row in apart]
        told = "; ".join(f"{NAMES[c]} keep {own} of the predictions" for c, own in spans.items()) + "."
        found.append(
            _said(
                part, told, judged(signs, "anchors keep more than text or random tokens", part.n, len(apart))
            )
        )
        if "speed" in tables:
            found += _beside_cache(
                _like(tables["speed"], part.table.iloc[0]), _like(tables["sizes"], part.table.iloc[0])
            )
    return found


def _beside_cache(speed: pd.DataFrame, sizes: pd.DataFrame) -> list[str]:
    """Anchors against whole demonstrations that are kept in a cache, as every user could do without losing anything."""
    rows = speed.set_index("condition")
    if not {"hidden_anchor", "whole_cached"} <= set(rows.index):
        return []
    anchors, whole = (span(rows.loc[c]) for c in ("hidden_anchor", "whole_cached"))
    memory = sizes[sizes["metric"] == "cache_bytes"].set_index("condition")["value"]
    gain = (anchors.widened(2) - whole.widened(2)).sign
    verdict = {
        1: "anchors are faster than that",
        -1: "anchors are slower than that",
        0: "undecided which is faster",
    }[gain]
    return [
        f"{rows['task'].iloc[0]}: whole demonstrations kept in a cache change no answer and are {whole} times as fast as reading them "
        f"with every prompt; anchors are {anchors} times as fast and take {100 * memory['hidden_anchor'] / memory['none']:.0f} % of that "
        f"cache: {verdict} (n = {int(rows['examples'].iloc[0])})."
    ]


def diagnose(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which labels are confused, why, and whether the keys foretold it."""
    found = []
    for part in parts(tables["summary"]):
        row = part.table.iloc[0]
        pairs, bias = (_like(tables[name], row) for name in ("pairs", "labels"))
        condition = str(row["condition"])
        found.append(f"{part.name}: {sentence(pairs, part.table, condition)}")
        why = biased(bias)
        if "classify_confusion" in tables:
            why += " " + beside_classify(pairs, _like(tables["classify_confusion"], row))
        rho = span(row, "correlation").widened(len(part.table))
        foretold = row["p"] * len(part.table) <= 0.05
        signs = [1 if foretold else -1 if rho.sign < 0 else 0]
        found.append(
            _said(
                part, why.strip(), judged(signs, "the keys foretell the confusion", part.n, len(part.table))
            )
        )
    return found


def biased(labels: pd.DataFrame) -> str:
    """Which label is said too often and which too seldom, in counts, and the most frequent mistake."""
    more = labels["said"] - labels["texts"]
    most, least = labels.loc[more.idxmax()], labels.loc[more.idxmin()]
    right, n = int(labels["right"].sum()), int(labels["texts"].sum())
    told = f"{right} of {n} answers are right."
    if most["said"] == most["texts"]:
        return told + " Every label is said as often as it is true."
    wrong = n - right
    named = int(most["said"] - most["right"])

    def counted(row: pd.Series) -> str:
        said, true = int(row["said"]), int(row["texts"])
        return (
            f"{row['label']} is said {said} time{'s' * (said != 1)} and true {true} time{'s' * (true != 1)}"
        )

    return (
        f"{told} {counted(most)}, {counted(least)}: {named} of {wrong} mistakes name {most['label']}. An AUC, which compares texts "
        "with texts, does not see such a bias."
    )


def beside_classify(pairs: pd.DataFrame, confusion: pd.DataFrame) -> str:
    """Whether the pair confused most by AUC is the one that `anchors classify` mistakes for each other most often."""
    plain = confusion[confusion["condition"] == "none"]
    wrong: dict[frozenset[str], int] = {}
    for row in plain[plain["gold"] != plain["predicted"]].itertuples():
        pair = frozenset((row.gold, row.predicted))
        wrong[pair] = wrong.get(pair, 0) + int(row.prompts)
    known = pairs.dropna(subset=["actual"])
    if not wrong or not max(wrong.values()) or not len(known):
        return ""
    worst = known.loc[known["actual"].idxmin()]
    top = max(wrong.values())
    leading = [pair for pair, count in wrong.items() if count == top]
    named = " or ".join(" and ".join(sorted(pair)) for pair in leading)
    agrees = frozenset((worst["one"], worst["other"])) in leading
    return (
        f"`classify` {'agrees' if agrees else 'disagrees'}: there {named} are mistaken for each other most often ({top} of "
        f"{int(plain['prompts'].sum())} prompts)."
    )


def causal(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Up to which layer the answer follows patched label words."""
    found = []
    for part in parts(tables["summary"]):
        follow = part.table[part.table["metric"] == "follow"]
        layers = sorted(follow["layer"].unique())
        curves = {c: own.set_index("layer") for c, own in follow.groupby("condition")}
        tests = len(layers) * len(curves)
        spans = {(c, x): span(curves[c].loc[x]) for c in curves for x in layers if x in curves[c].index}
        half = Span(0.5, 0.5, 0.5)
        told, signs = [], []
        own = {x: spans["label", x].widened(tests) for x in layers if ("label", x) in spans}
        if held := [x for x in own if (own[x] - half).sign > 0]:
            told.append(
                f"more than half of the answer follows label words that are patched before layer {held[-1]} "
                f"({spans['label', held[-1]]})"
            )
        else:
            told.append("before no layer does surely more than half of the answer follow patched label words")
        if gone := [x for x in own if (half - own[x]).sign > 0]:
            told.append(f"from layer {gone[0]} on less than half ({spans['label', gone[0]]})")
        both = [x for x in own if ("random", x) in spans]
        ahead = [x for x in both if (own[x] - spans["random", x].widened(tests)).sign > 0]
        if ahead:
            told.append(f"random positions there: {spans['random', ahead[0]]} before layer {ahead[0]}")
        behind = both and all((own[x] - spans["random", x].widened(tests)).sign < 0 for x in both)
        signs = [1 if ahead and held else -1 if behind else 0]
        finding = "label words carry the answer, random positions do not"
        found.append(_said(part, "; ".join(told) + ".", judged(signs, finding, part.n, tests, paper=False)))
    return found


def flow_map(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Of single prompts how much of the flow goes into label words, and from them to the target, beside their share of the pairs."""
    place, found = ["task", "seed", "example"], []
    ends = tables["tokens"].set_index([*place, "position"])[["role", "counted"]]
    flows = tables["flows"].join(ends.add_suffix("_to"), on=[*place, "to"])
    flows = flows.join(ends.add_suffix("_from"), on=[*place, "from_"])
    answer = (flows["role_to"] == "target") & flows["counted_from"].astype(bool)
    for task, own in flows.assign(s_pq=answer, s_wp=flows["counted_to"].astype(bool)).groupby(
        "task", sort=False
    ):
        told = []
        for layer, part in own.groupby("layer"):
            prompts = [
                [share for name in ("s_wp", "s_pq") for share in (one.loc[one[name], "value"].sum() / one["value"].sum(), one[name].mean())]
                for _, one in part.groupby(place[1:])
            ]  # fmt: skip
            into, pairs, out, others = (
                estimate(sum(x) / len(x), None, None, digits=3) for x in zip(*prompts, strict=True)
            )
            told.append(
                f"in layer {layer} {into} of the flow goes into label words, to which {pairs} of the pairs of tokens belong, and {out} "
                f"from them to the target ({others} of the pairs)"
            )
        found.append(f"{task}: {'; '.join(told)}. {_single(len(prompts))}")
    return found


def top_words(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Of single prompts how many of the most probable next words are left under each condition."""
    found = []
    for task, own in tables["words"].groupby("task", sort=False):
        tops = {
            condition: part.sort_values("rank").groupby(["seed", "number"])["word"].agg(list)
            for condition, part in own.groupby("condition", sort=False)
        }
        if "none" not in tops or len(tops) < 2:
            continue
        told, before = [], tops.pop("none")
        for condition, after in tops.items():
            both = list(zip(before, after.reindex(before.index), strict=True))
            kept = sum(len({*one} & {*other}) for one, other in both) / len(both)
            first = sum(one[0] == other[0] for one, other in both)
            told.append(
                f"{kept:.3g} are left, and the first of them in {first} of {len(both)}, where {explained(str(condition)) or condition}"
            )
        found.append(
            f"{task}: of the {int(own['rank'].max())} most probable next words {'on average ' * (len(before) > 1)}{'; '.join(told)}. {_single(len(before))}"
        )
    return found


def _single(prompts: int) -> str:
    """How far what single prompts show can be trusted."""
    return (
        "One prompt shows what there is to see, and estimates nothing."
        if prompts == 1
        else f"{prompts} prompts show what there is to see, and estimate nothing."
    )


def _row(table: pd.DataFrame, condition: str, metric: str) -> pd.Series | None:
    own = table[(table["condition"] == condition) & (table["metric"] == metric)]
    return own.iloc[0] if len(own) else None


def _like(table: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    return table[(table[GROUP] == row[GROUP].tolist()).all(axis=1)]


NAMES = {
    "none": "the untouched model",
    "label": "label words exchanged for those of the other prompt",
    "random": "as many random positions exchanged",
    "exchanged": "the other prompt itself",
    "calibrated": "probabilities divided by those of a text without content",
    "reweighted": "label words weighed by the fitted β",
    "hidden_anchor": "keys and values of label words and format",
    "text_anchor": "label words and format as text",
    "hidden_random": "keys and values of format and random words (mean of the draws)",
    "whole_cached": "whole demonstrations, run once and kept in a cache",
    "hidden_random_top": "the draw of random words with the best label loyalty",
}


def explained(condition: str) -> str:
    """What a condition of a study of prompts means; empty where its name says all that is known of it."""
    if found := re.fullmatch(r"(first|last)-(\d+)/(label|random)", condition):
        side, k, what = found.groups()
        whose = "label words" if what == "label" else "as many random positions"
        return f"{whose} see nothing before them in the {side} {k} layer{'s' * (k != '1')}"
    if found := re.fullmatch(r"components-(\d+)", condition):
        return f"keys seen along the queries' first {found[1]} principal components"
    return NAMES.get(condition, "")


def flow_prompts(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Where most flows into the target, and how much of that comes from the first token."""
    found = []
    for task, part in tables["summary"].groupby("task", sort=False):
        by = part.set_index(["metric", "layer"])
        most = by.loc["s_tq", "value"].astype(float).idxmax()
        n = int(part["examples"].iloc[0])
        found.append(
            f"{task}: most flows into the target in layer {most} (S_tq {span(by.loc[('s_tq', most)])}); there {span(by.loc[('first_token', most)])} of it "
            f"comes from the first token (n = {n}). A flow says what is read, and not that it is needed."
        )
    return found
