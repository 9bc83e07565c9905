"""Whether three models can have one origin, from a few of their tensors: a merge of strangers is well-shaped noise."""

from anchors.errors import AnchorsError
from anchors.injection.sources import Sources, by_rows

SAMPLED = 8
"""Matrices that are looked at."""
UNRELATED = 0.7
"""‖τ‖ / ‖b‖ above which little of the anchor is left; two unrelated models of one size have about √2."""


def require_anchor(sources: Sources, sampled: int = SAMPLED) -> None:
    """Refuse a base that is not what tower and expert were made from, before anything is merged.

    ‖τ‖ / ‖b‖, over a few matrices that are evenly spread over the tower, is some per cent after fine-tuning and about
    √2 between two models that were trained apart. Finer signs are those of `inspect`, which reads everything.

    Args:
        sources: the three models.
        sampled: matrices to read.

    Raises:
        AnchorsError: ‖τ_v‖ or ‖τ_e‖ is more than 0.7 ‖b‖.
    """
    names = [
        name
        for name, (pair, _) in sources.pairs.items()
        if not by_rows(pair) and len(sources.vlm.shapes[name]) == 2
    ]
    base, sums = 0.0, {"vision-language model": 0.0, "expert": 0.0}
    for name in names[:: max(1, len(names) // sampled)]:
        b, v, e = (tensor.float() for tensor in sources.weights(name))
        base += float(b.square().sum())
        for role, tensor in zip(sums, (v, e), strict=True):
            sums[role] += float((tensor - b).square().sum())
    far = {role: (own / base) ** 0.5 for role, own in sums.items() if own > UNRELATED**2 * base}
    if far:
        measured = " and ".join(f"{ratio:.2f} for the {role}" for role, ratio in far.items())
        raise AnchorsError(
            f"{sources.base.name!r} is not what the {' and the '.join(far)} came from: ‖τ‖ / ‖b‖ is {measured}, "
            "where fine-tuning makes some hundredths of it.",
            "Give the model that both were trained from as --base, or --force to merge all the same.",
        )
