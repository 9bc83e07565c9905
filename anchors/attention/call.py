"""A dense attention call at the seam: `AttentionCall(layer, q, k, v, scale)`."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from anchors.attention.dense import DenseCall
from anchors.attention.form import boolean as boolean
from anchors.attention.form import grouped as grouped
from anchors.attention.form import grouped_transposed as grouped_transposed
from anchors.attention.streaming import streaming
from anchors.attention.taps import Tap


@dataclass(frozen=True)
class AttentionCall(DenseCall):
    """The dense form of `anchors.attention.form.Call`; see `anchors.attention.dense` for its equations."""

    def streamed(self, taps: Sequence[Tap]) -> Float[Tensor, "batch heads query dim_v"]:
        """In tiles, without ever holding the pattern (`anchors.attention.streaming`)."""
        return streaming(self, taps)
