"""The configuration of a causal language model with Native Sparse Attention, in transformers' own way."""

import math

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from anchors.errors import AnchorsError, nearest
from anchors.nsa.geometry import BACKENDS, Geometry
from anchors.nsa.phi import PHI

ROPE = ("block_centre", "block_start", "inner", "none")
"""Where a compressed key stands for the rotary embedding: the middle of its block (the paper does not say), its
first token, φ of keys rotated one by one, or nowhere (then that branch's queries are not rotated either)."""


@strict
class NSAConfig(LlamaConfig):
    """A Llama whose attention is NSA (`attention="nsa"`) or full (`attention="full"`, the same model to compare with).

    Attributes, beyond those of `LlamaConfig`:
        attention: nsa or full.
        value_head_dim: d_v; d_k (`head_dim`) unless given.
        l, d, lp, n, w, n_init, n_local: the geometry, see `anchors.nsa.geometry.Geometry`.
        phi: φ of Eq. 7: mean, linear or mlp.
        compressed_rope: one of `ROPE`.
        gate_bias: where the three gates of every head begin, before the sigmoid: 0 is an open half each.
        backend: auto, reference or triton.
    """

    model_type = "nsa"

    attention: str = "nsa"
    value_head_dim: int | None = None
    l: int = 32
    d: int = 16
    lp: int = 64
    n: int = 16
    w: int = 512
    n_init: int = 1
    n_local: int = 2
    phi: str = "mlp"
    compressed_rope: str = "block_centre"
    gate_bias: float = 0.0
    backend: str = "auto"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        for name, allowed in (
            ("attention", ("nsa", "full")),
            ("phi", tuple(PHI)),
            ("compressed_rope", ROPE),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in allowed:
                raise AnchorsError(
                    f"There is no {name} {getattr(self, name)!r}.", nearest(getattr(self, name), allowed)
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise AnchorsError(
                f"{self.num_attention_heads} query heads cannot be divided among {self.num_key_value_heads} groups.",
                "Choose a number of key-value heads that divides the query heads.",
            )
        if self.attention == "full" and self.value_head_dim != self.head_dim:
            raise AnchorsError(
                f"Full attention here has d_v = d_k, but value_head_dim is {self.value_head_dim}.",
                "Leave value_head_dim out.",
            )
        if self.head_dim % 2:
            raise AnchorsError(
                f"head_dim is {self.head_dim}: the rotary embedding turns pairs of numbers.",
                "Take an even one.",
            )
        theta = (self.rope_parameters or {}).get("rope_theta", 1.0)
        if not 0 < theta < math.inf:
            raise AnchorsError(f"rope_theta is {theta}; it must be above 0.", "10000 is usual.")
        _ = self.geometry

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.l, self.d, self.lp, self.n, self.w, self.n_init, self.n_local)
