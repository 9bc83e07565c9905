"""What an accuracy of exact answers has to be compared with: answers that are guessed."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from anchors.injection.asking.suite import Suite


def guessing(
    suites: Sequence[Suite], scenarios: Iterable[str], split: str, limit: int | None = None
) -> pd.DataFrame:
    """How often an answer would be right that does not depend on the question's picture, nor on its words.

    Args:
        suites: of one experiment.
        scenarios, split, limit: which of their examples are asked.

    Returns:
        One row per scenario: `chance` (guessing among the different right answers to questions of the kind), `majority`
        (always giving the most frequent right answer to questions of the kind), answers (how many different ones there
        are), examples (over all suites).
    """
    rows = []
    for scenario in scenarios:
        asked = [e for suite in suites for e in suite.examples(scenario, split, limit)]
        by_kind = {
            kind: Counter(e.answer for e in asked if e.kind == kind) for kind in {e.kind for e in asked}
        }
        rows.append(
            {
                "scenario": scenario,
                "chance": sum(own.total() / len(own) for own in by_kind.values()) / len(asked),
                "majority": sum(max(own.values()) for own in by_kind.values()) / len(asked),
                "answers": len({e.answer for e in asked}),
                "examples": len(asked),
            }
        )
    return pd.DataFrame(rows)
