"""Reading the prediction off the attention to the label words (2.3): do deep layers extract it there?"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.form import Call


@dataclass
class TargetAttention:
    """A probe that keeps Σ_h A_{h,l}(q, p) for the target q of each example and given positions p.

    Attributes:
        layers: where it looks.
        target: q of each example, as a row of the call's queries.
        positions: [batch, positions], columns of the call's keys.
        found: by layer, [batch, positions].
    """

    layers: frozenset[int]
    target: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch positions"]

    def __post_init__(self) -> None:
        self.found: dict[int, Float[Tensor, "batch positions"]] = {}

    def see(self, call: Call) -> None:
        home = call.q.device
        row = call.pattern_at(self.target.to(home)[:, None])[:, :, 0].sum(1)
        self.found[call.layer] = row.gather(1, self.positions.to(home))


__getattr__ = forwarding(__name__)
