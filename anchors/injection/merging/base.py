"""Whether three models can have one origin, from their configurations and a few of their tensors: a merge of strangers is
well-shaped noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from anchors.errors import AnchorsError
from anchors.injection.merging.recipe import PIECE
from anchors.injection.merging.sources import Sources, by_rows

SAMPLED = 8
"""Matrices that are looked at."""
UNRELATED = 0.7
"""‖τ‖ / ‖b‖ above which little of the base is left; two unrelated models of one size have about √2."""

DECISIVE = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "activation", "num_experts_per_tok", "norm_topk_prob",
)  # fmt: skip
"""What another model of the same shapes may differ in, and no fine-tuning changes."""
ADJUSTED = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rms_norm_eps", "sliding_window")
"""What a longer training may have changed: weights then fit one value, the merged model has the VLM's."""

_TEXT = ("text_config", "llm_config", "language_config")
"""What configurations call the part that is the tower's, transformers' own and those of InternVL and DeepSeek."""

# Sections of images' positions: a text has the same position in all.
_NO_SCALING = ("rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved")


def require_base(sources: Sources, sampled: int = SAMPLED) -> None:
    """Refuse a base that is not what tower and expert were made from, before anything is merged.

    Configurations must agree in heads, activation and how experts are chosen: the same matrices, cut otherwise into heads,
    are another function.
    ‖τ‖ / ‖b‖, over a few matrices that are evenly spread over the tower, is some per cent after fine-tuning and about
    √2 between two models that were trained apart. Finer signs are those of `inspect`, which reads everything.

    Args:
        sources: the three models.
        sampled: matrices to read.

    Raises:
        AnchorsError: ‖τ_v‖ or ‖τ_e‖ is more than 0.7 ‖b‖; configurations differ in what training cannot change.
    """
    if odd := differing(sources, DECISIVE):
        raise AnchorsError(
            " ".join(odd),
            "Give the model that both were trained from as --base, or --force to merge all the same.",
            code="merge-unrelated",
        )
    shapes, slices = sources.vlm.apart.shapes, sources.vlm.apart.slices
    names = [
        name for name, (pair, _) in sources.pairs.items() if not by_rows(pair) and len(shapes[name]) == 2
    ]
    plain = [name for name in names if name not in slices]
    stacked = {name.split(".")[-2]: name for name in names if name in slices}
    # Of experts that were taken apart every kind by itself: gates in the place of ups would be lost in the sum.
    for chosen in (plain[:: max(1, len(plain) // sampled)], *([name] for name in stacked.values())):
        far = {role: far for role, far in _distances(sources, chosen).items() if far > UNRELATED}
        if not far:
            continue
        measured = " and ".join(f"{ratio:.2f} for the {role}" for role, ratio in far.items())
        where = f" in {chosen[0]}" if chosen[0] in slices else ""
        raise AnchorsError(
            f"{sources.base.name!r} is not what the {' and the '.join(far)} came from: ‖τ‖ / ‖b‖ is {measured}{where}, "
            "where fine-tuning makes some hundredths of it.",
            "Give the model that both were trained from as --base, or --force to merge all the same.",
            code="merge-unrelated",
        )


def _distances(sources: Sources, names: Sequence[str]) -> dict[str, float]:
    """‖τ‖ / ‖b‖ over some tensors, by whose τ it is."""
    base, sums = 0.0, {"vision-language model": 0.0, "expert": 0.0}
    for name in names:
        # In pieces: a matrix of a large model is a gigabyte in float32, and three of them are more than the merge needs.
        for own in zip(*(tensor.reshape(-1).split(PIECE) for tensor in sources.weights(name)), strict=True):
            b, v, e = (piece.float() for piece in own)
            base += float(b.square().sum())
            for role, piece in zip(sums, (v, e), strict=True):
                sums[role] += float((piece - b).square().sum())
    return {role: 0.0 if own == 0 else ratio(own, base) ** 0.5 for role, own in sums.items()}


def ratio(one: float, other: float) -> float:
    """one / other; infinite where there is nothing to divide by."""
    return one / other if other else math.inf


def differing(sources: Sources, facts: tuple[str, ...] = DECISIVE + ADJUSTED) -> tuple[str, ...]:
    """What the configurations of base and tower, or base and expert, do not agree in, as sentences.

    What one of the two does not say is no difference: configurations leave out what is the default of their class.
    """
    own = {role: computed(model.config) for role, model in sources.roles().items()}
    found = []
    for role, name in (("vlm", "vision-language model"), ("expert", "expert")):
        pairs = {fact: (own["base"].get(fact), own[role].get(fact)) for fact in facts}
        odd = [f"{fact} {b}, not {e}" for fact, (b, e) in pairs.items() if None not in (b, e) and b != e]
        if odd:
            found.append(f"The base computes otherwise than the {name}: it has {', '.join(odd)}.")
    return tuple(found)


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of how a language model, or the tower in a vision-language model, computes.

    Generations of transformers write rotary embeddings differently (`rope_theta` and `rope_scaling`, or both in
    `rope_parameters`, of Gemma for two kinds of layers); what is said in one way reads as what is said in the other.
    """
    parts = (config.get(name) for name in _TEXT)
    text = next((part for part in parts if isinstance(part, Mapping) and part), config)
    both = text.get("rope_parameters") or {}
    rope = both.get("full_attention", both)
    facts = {name: text.get(name) for name in (*DECISIVE, *ADJUSTED)}
    if str(text.get("model_type", config.get("model_type"))).startswith("qwen3_vl_moe"):
        facts["norm_topk_prob"] = True  # in its code, whatever a configuration says
    facts["activation"] = _plain(text.get("hidden_activation") or text.get("hidden_act"))
    facts["rope_theta"] = text.get("rope_theta", rope.get("rope_theta"))
    facts["rope_local_base_freq"] = text.get(
        "rope_local_base_freq", both.get("sliding_attention", {}).get("rope_theta")
    )
    facts["rope_scaling"] = None
    if rope or "rope_scaling" in text:
        scaling = rope or text["rope_scaling"] or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        others = {key: own for key, own in scaling.items() if key not in _NO_SCALING and own is not None}
        facts["rope_scaling"] = {"rope_type": "default" if kind == "mrope" else kind} | others
    if "sliding_window" in text:
        used = text.get("use_sliding_window", True)
        facts["sliding_window"] = (text["sliding_window"] if used else None) or "off"
    return facts


def _plain(activation: str | None) -> str | None:
    """One name for what is the same function up to rounding."""
    if activation is None:
        return None
    return "gelu" if activation.startswith("gelu") else activation.replace("swish", "silu")
