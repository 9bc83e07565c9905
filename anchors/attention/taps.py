"""What can listen at the seam."""

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.call import AttentionCall


class Tap(Protocol):
    """Sees A ⊙ ∂L/∂A of the layers it names while a loss is differentiated; changes nothing.

    `begin` comes once per call and layer, with the output z and its gradient; then `tile` for every tile of
    query rows whose gradient is not zero (elsewhere the product is zero), with the range of keys it covers.
    """

    @property
    def layers(self) -> frozenset[int]: ...

    def begin(
        self,
        call: AttentionCall,
        z: Float[Tensor, "batch heads query dim_v"],
        dz: Float[Tensor, "batch heads query dim_v"],
    ) -> None: ...

    def tile(
        self,
        call: AttentionCall,
        rows: Int[Tensor, " rows"],
        keys: slice,
        product: Float[Tensor, "batch heads rows keys"],
    ) -> None: ...
