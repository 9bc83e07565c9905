"""What can listen at the seam."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from anchors.attention.form import Call


@runtime_checkable
class Probe(Protocol):
    """Looks at the calls of the layers it names before they are computed; changes nothing and needs no gradient."""

    @property
    def layers(self) -> frozenset[int]: ...

    def see(self, call: Call) -> None: ...


@runtime_checkable
class Tap(Protocol):
    """Sees A ⊙ ∂L/∂A of the layers it names while a loss is differentiated; changes nothing.

    `begin` comes once per call and layer, with the output z and its gradient; then `tile` for every tile of
    query rows whose gradient is not zero (elsewhere the product is zero), with the range of keys it covers.
    """

    @property
    def layers(self) -> frozenset[int]: ...

    def begin(
        self,
        call: Call,
        z: Float[Tensor, "batch heads query dim_v"],
        dz: Float[Tensor, "batch heads query dim_v"],
    ) -> None: ...

    def tile(
        self,
        call: Call,
        rows: Int[Tensor, " rows"],
        keys: slice,
        product: Float[Tensor, "batch heads rows keys"],
    ) -> None: ...


class Slopes(NamedTuple):
    """What the CUDA kernels of a layer's backward pass read besides the call itself.

    Attributes:
        dz: ∂L/∂z.
        lse: log₂ Σ_j exp(scores_ij), from the forward kernel.
        inner: ⟨z_i, ∂L/∂z_i⟩.
        live: which blocks of rows have a gradient at all.
        block: rows of such a block.
        window: how many last keys a row sees, itself included.
        precision: how float32 tiles are multiplied, in Triton's words.
    """

    dz: Float[Tensor, "batch heads query dim_v"]
    lse: Float[Tensor, "batch heads query"]
    inner: Float[Tensor, "batch heads query"]
    live: Int[Tensor, "batch blocks"]
    block: int
    window: int
    precision: str


@runtime_checkable
class FusedTap(Tap, Protocol):
    """A tap that can also do with sums over heads, which the CUDA kernels form without showing any tile.

    `fused` comes once per call and layer, in the place of `begin` and every `tile`.
    """

    def fused(self, call: Call, slopes: Slopes) -> None: ...


class Summed(NamedTuple):
    """What is kept of I = |Σ_h A ⊙ ∂L/∂A| of a layer where no tile of it is shown.

    Attributes:
        rows: I of the wanted rows.
        total: Σ_{j<i} I[i, j].
        full: I, of layers whose map is wanted.
        error: max |Σ_j A_ij ∂L/∂A_ij − ⟨z_i, ∂L/∂z_i⟩| and the largest |⟨z_i, ∂L/∂z_i⟩|; of a branch there is none.
    """

    rows: Float[Tensor, "batch wanted key"]
    total: Float[Tensor, " batch"]
    full: Float[Tensor, "batch query key"] | None = None
    error: tuple[Tensor, Tensor] | None = None


@runtime_checkable
class SummedTap(Tap, Protocol):
    """A tap that can also do with the sums of a call of several branches, which form no tile in memory.

    `summed` comes once per call and layer, in the place of `begin` and every `tile`, with the sums of all branches
    together under `all`, and of each by its name where `by_branch`.
    """

    @property
    def wanted(self) -> Int[Tensor, "batch rows"]: ...

    @property
    def maps(self) -> frozenset[int]: ...

    @property
    def by_branch(self) -> bool: ...

    def summed(
        self, call: Call, dz: Float[Tensor, "batch heads query dim_v"], found: Mapping[str, Summed]
    ) -> None: ...
