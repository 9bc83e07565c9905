"""The block geometry of Native Sparse Attention, under the paper's symbols.

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), sections 3.2 and 4.1.
"""

from dataclasses import dataclass

from anchors.errors import AnchorsError

BACKENDS = ("auto", "reference", "triton")
"""What computes NSA: the equations, the kernels, or the kernels where they run."""


@dataclass(frozen=True)
class Geometry:
    """Which tokens the three branches of NSA can read.

    Attributes:
        l: tokens in a compression block.
        d: stride between compression blocks; compressed token i stands for positions [i·d, i·d + l).
        lp: tokens in a selection block, l' in the paper.
        n: selected blocks per query and group, the initial and local ones included.
        w: tokens of the sliding window, the current one included.
        n_init: blocks at the start that are always selected.
        n_local: last blocks that are always selected: a query's own, the one before it, …

    Raises:
        AnchorsError: sizes that the equations do not allow.
    """

    l: int = 32
    d: int = 16
    lp: int = 64
    n: int = 16
    w: int = 512
    n_init: int = 1
    n_local: int = 2

    def __post_init__(self) -> None:
        for name in ("l", "d", "lp", "n", "w"):
            if getattr(self, name) < 1:
                raise AnchorsError(
                    f"{name} is {getattr(self, name)}.", "It must be at least 1.", code="geometry"
                )
        if self.l % self.d:
            raise AnchorsError(
                f"l = {self.l} is not a multiple of d = {self.d}.",
                "Eq. 9 adds up whole strides: choose d so that it divides l.",
                code="geometry",
            )
        if self.lp % self.d:
            raise AnchorsError(
                f"l' = {self.lp} is not a multiple of d = {self.d}.",
                "Eq. 9 adds up whole strides: choose d so that it divides l'.",
                code="geometry",
            )
        if self.lp < self.l:
            raise AnchorsError(
                f"Selection blocks of {self.lp} tokens are smaller than compression blocks of {self.l}.",
                "Eq. 9 needs l <= l'.",
                code="geometry",
            )
        if min(self.n_init, self.n_local) < 0 or self.n_init + self.n_local > self.n:
            raise AnchorsError(
                f"{self.n_init} initial and {self.n_local} local blocks do not fit among n = {self.n} selected ones.",
                "n counts them too: raise it, or lower them.",
                code="geometry",
            )

    def compressed(self, tokens: int) -> int:
        """Number of compression blocks that are complete within `tokens` (Eq. 7)."""
        return max(0, (tokens - self.l) // self.d + 1)

    def blocks(self, tokens: int) -> int:
        """Number of selection blocks that `tokens` begin."""
        return -(-tokens // self.lp)

    def fully_selected(self, tokens: int) -> bool:
        """Whether every block is selected anyway, so that selection says nothing about what is in them."""
        return self.blocks(tokens) <= self.n
