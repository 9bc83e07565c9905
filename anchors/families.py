"""Families of transformers' models and what the toolkit is exact on: what came of asking each, as `families.json` keeps it.

Each number was compared on a tiny random model with transformers' own eager attention, autograd and loops, by
`benchmarks/families.py`; `docs/families_page.py` writes this package's file from its table.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VERBS = {
    "causal": {
        "flow": ("padded", "sums"),
        "view": ("maps",),
        "classify": ("logits", "shared"),
        "diagnose": ("logits", "shared"),
        "isolate": ("isolation",),
        "readout": ("readout",),
        "reweight": ("re-weighting",),
        "compress": ("compression",),
        "causal": ("isolation", "patching"),
    },
    "image-text": {"inject sweep": ("logits",), "inject flow": ("logits", "image sums")},
}
"""By kind of model and verb of the command line: the numbers that it rests on."""


@dataclass(frozen=True)
class Family:
    """A family, or a variant of one, and what came of it.

    Attributes:
        name: transformers' `model_type`, with `+variant`.
        kind: `causal`, or `image-text`.
        numbers: verdict by number (`logits`, `sums`, …): exact, refused, wrong, crash, unjudged or not tried.
        error: the largest among the exact numbers, relative (for probabilities and losses: absolute); None where there are none.
        reason: of the first number that is not exact, in the toolkit's own words.
        transformers: the version that it was asked in.
    """

    name: str
    kind: str
    numbers: dict[str, str]
    error: float | None
    reason: str
    transformers: str

    @property
    def verbs(self) -> dict[str, str]:
        """Verdict by verb: exact where each number is that the verb rests on."""
        found = {}
        for verb, numbers in VERBS[self.kind].items():
            verdicts = [self.numbers.get(n) or self.numbers["all"] for n in numbers]
            found[verb] = next((v for v in verdicts if v != "exact"), "exact")
        return found

    @property
    def verdict(self) -> str:
        """In words: exact, refused, or what of it is exact."""
        verdicts = self.verbs
        lost = {
            v: [verb for verb, own in verdicts.items() if own == v] for v in dict.fromkeys(verdicts.values())
        }
        if len(lost) == 1:
            return next(iter(lost))
        return "exact, but " + ", ".join(
            f"{verdict}: {', '.join(verbs)}" for verdict, verbs in lost.items() if verdict != "exact"
        )


@cache
def families() -> tuple[Family, ...]:
    """All that were asked, by kind and name."""
    kept = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
    return tuple(
        Family(reason=kept["reasons"][reason], transformers=kept["transformers"][at], **own)
        for own, reason, at in kept["families"]
    )


def summary() -> str:
    """In a sentence: how many are exact in all, in part, and refused."""
    parts = []
    for kind in VERBS:
        verdicts = [f.verdict for f in families() if f.kind == kind and "+" not in f.name]
        whole, part = verdicts.count("exact"), sum(v.startswith("exact,") for v in verdicts)
        refused = verdicts.count("refused")
        rest = len(verdicts) - whole - part - refused
        parts.append(
            f"of {len(verdicts)} {kind} families {whole} are exact in every number"
            + (f" and {part} in some" if part else "")
            + f", {refused} are refused"
            + (f", {rest} could not be asked" if rest else "")
        )
    return "; ".join(parts)


def known(kind: str) -> str:
    """What to say where a model is refused: how many families work, and where they stand."""
    exact = sum(f.verdict.startswith("exact") for f in families() if f.kind == kind and "+" not in f.name)
    return f"{exact} {kind} families are known to work: `anchors check --families`."
