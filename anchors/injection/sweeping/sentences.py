"""What the tables of `anchors inject sweep` say."""

from collections.abc import Mapping

import pandas as pd

from anchors.injection.sweeping.tables import PLAIN, VLM
from anchors.intervals import estimate
from anchors.summaries.sentences import judged, span


def said(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Of every scenario what the chosen setting gains, keeps and sees, and whether another method than task arithmetic is ahead.

    A verdict needs examples apart, on which the setting was chosen: on those it was chosen on the best is flattered.
    """
    found, summary = [], tables["summary"].set_index(["scenario", "setting"])
    best = tables["best"][tables["best"]["family"] == "any"].to_dict("records")
    tests = 2 * len(best)
    for row in best:
        scenario, chosen = row["scenario"], row["setting"]
        share = f"{100 * row['retention']:g} % of the VLM's vision on {row['chosen_on']}"
        if chosen == VLM:
            found.append(
                f"{scenario}: no setting that keeps {share} has more of the skill than the VLM alone."
            )
            continue
        before = span(summary.loc[(scenario, VLM)], "skill")
        n = int(summary.loc[(scenario, chosen), "examples"])
        told = (
            f"{scenario}: of the settings that keep {share} none has more of the skill than {chosen}; on {row['split']} it answers "
            f"{span(row, 'skill')} of the questions, where the VLM alone answers {before}"
        )
        if pd.notna(row["vision_kept"]):
            told += f", and keeps {span(row, 'vision_kept')} of its vision"
        gains = [span(row, "skill") - before]
        if pd.notna(row["net"]):
            told += f"; on blank images it answers {span(row, 'blank')}"
            gains.append(span(row, "net"))
        if "difference" in row and not chosen.startswith(f"{PLAIN} "):
            told += f"; it is {estimate(*span(row, 'difference'), signed=True)} ahead of task arithmetic at its best"
        finding = "the merge gives a skill" + (", and it needs the picture" if len(gains) > 1 else "")
        apart = row["chosen_on"] != row["split"]
        verdict = (
            judged([gain.widened(tests).sign for gain in gains], finding, n, tests, paper=False)
            if apart
            else "It was chosen on the examples it is reported on, which flatters it: no verdict."
        )
        found.append(f"{told}. {verdict}")
    return found
