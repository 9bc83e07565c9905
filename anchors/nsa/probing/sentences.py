"""What the tables of `anchors nsa probe` say, and the names of its interventions in words."""

import re
from collections.abc import Mapping

import pandas as pd

from anchors.intervals import estimate
from anchors.nsa.probing.tables import control_of
from anchors.summaries.sentences import Span, judged, span

BRANCHES = {"cmp": "compressed tokens", "slc": "selected blocks", "win": "sliding window"}
PLACES = {"label": "label words", "last": "the last position", "control": "as many words of the texts"}
WHOSE = {"label": "label words", "answer": "label words of the right class"}


def explained(condition: str) -> str:
    """What an intervention does, see `anchors.nsa.probing.interventions`; empty for another name."""
    if found := re.fullmatch(r"cut-(cmp|slc|win)-(label|last|control)", condition):
        return f"no {BRANCHES[found[1]]} at {PLACES[found[2]]}: the gate of that branch is 0 there"
    if found := re.fullmatch(r"(ban|force)-(label|answer)(-control)?", condition):
        what = (
            f"as many of the nearest other blocks as hold {WHOSE[found[2]]}"
            if found[3]
            else f"the blocks that hold {WHOSE[found[2]]}"
        )
        return (
            f"the last position may not select {what}"
            if found[1] == "ban"
            else f"the last position selects {what} first"
        )
    if found := re.fullmatch(r"isolate-(label|answer|control)", condition):
        what = WHOSE.get(found[1], "as many words of the demonstrations' texts")
        return (
            f"the last position sees no {what} in any branch"
            if found[1] != "control"
            else f"the last position does not see {what}"
        )
    return ""


def said(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Whether hiding the label words costs more than hiding as many other words, and which intervention costs most."""
    if "summary" not in tables:
        return []
    own = tables["summary"]
    own = own[own["metric"] == "accuracy"].set_index("condition")
    compared = [c for c in own.index if control_of(str(c)) in own.index]
    found = []
    if "isolate-label" in own.index and "beyond" in own:
        row = own.loc["isolate-label"]
        cost, beyond = (span(row, name) for name in ("difference", "beyond"))
        wide, tests = beyond.widened(len(compared)), len(compared)
        verdict = judged(
            [int(wide.high < 0) - int(wide.low > 0)],
            "the model is anchored: hiding the label words costs more than hiding other words",
            int(row["prompts"]),
            tests,
            paper=False,
        )
        found.append(
            f"Hiding all label words from the last position changes accuracy by {estimate(*cost, signed=True)}, beyond hiding as "
            f"many other words by {estimate(*beyond, signed=True)}. {verdict}"
        )
    changed = (
        own.drop(index="none", errors="ignore").dropna(subset=["difference"])
        if "difference" in own
        else own[:0]
    )
    if len(changed):
        worst = changed["difference"].idxmin()
        wide: Span = span(changed.loc[worst], "difference").widened(len(changed))
        sure = (
            ""
            if wide.high < 0
            else f", which is no sure loss after correction for {len(changed)} interventions"
        )
        told = f"Of {len(changed)} interventions {worst} costs most ({explained(str(worst))}): {estimate(*span(changed.loc[worst], 'difference'), signed=True)}"
        found.append(f"{told}{sure} (n = {int(changed.loc[worst, 'prompts'])}).")
    return found
