"""What the tables of `anchors inject flow` say."""

from collections.abc import Mapping

import pandas as pd

from anchors.intervals import estimate
from anchors.summaries.sentences import FEWEST, span

SURE = 0.05
"""The q from which on a correlation is no chance."""


def said(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Whether vision damage goes with lost image flow beyond λ, and which rule for λ has the least regret."""
    found = []
    if "damage" in tables and len(known := tables["damage"].dropna(subset=["within"])):
        sure = known[known["within_q"] <= SURE]
        best = known.loc[known["within_q"].idxmin()]
        n = int(best["settings"])
        strongest = f"{best['metric']} in {best['part']} layers by {best['measure']}: ρ {best['within']:+.2f}, q = {best['within_q']:.3f}"
        if n < FEWEST:
            verdict = f"Undecided: {n} settings are too few for a verdict on whether vision damage goes with lost image flow"
        elif len(sure) and (sure["within"] > 0).all():
            verdict = "Vision damage goes with lost image flow, beyond what λ tells"
        elif len(sure) and (sure["within"] < 0).all():
            verdict = "Vision damage does not go with lost image flow here, but with more of it"
        else:
            verdict = "Undecided: whether vision damage goes with lost image flow beyond what λ tells"
        found.append(
            f"{verdict} ({len(sure)} of {len(known)} tests after correction for all of them; strongest: {strongest}; n = {n} settings on "
            f"{int(best['curves'])} curves)."
        )
    if "regret" in tables and len(tables["regret"]) > 1:
        ranked = tables["regret"].sort_values("regret", ignore_index=True)
        first, second = ranked.iloc[0], ranked.iloc[1]
        spans = [estimate(row["regret"], row["low"], row["high"], digits=3) for row in (first, second)]
        ahead = (
            span(second, "regret").widened(len(ranked)) - span(first, "regret").widened(len(ranked))
        ).sign > 0
        verdict = "it is ahead" if ahead else "undecided which is better after correction for all rules"
        found.append(
            f"Of {len(ranked)} rules for λ {first['rule']!r} has the least mean regret, {spans[0]}, before {second['rule']!r}, {spans[1]}; "
            f"{verdict} (n = {int(first['units'])} experts and trainings)."
        )
    return found
