"""φ of Eq. 7: one compressed key (or value) from the l keys (or values) of a block.

The paper's φ is "a learnable MLP with intra-block position encoding" of unsaid depth and width. Here every φ is
piecewise linear, so that it can be taken apart again, exactly:

    φ(x) = Σ_m φ_m(x) + r(x),   φ_m(x) = J_m(x) x_m

with J_m the derivative by the m-th token of the block and r what the position encoding and the biases add, which
belongs to no token. Attention to a compressed token is split over its l tokens by it.

All groups share one φ; keys and values have one each.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anchors.errors import AnchorsError, nearest

Parts = tuple[Float[Tensor, "*blocks l dim_out"], Float[Tensor, "*blocks dim_out"]]


class MeanPool(nn.Module):
    """φ(x) = (1/l) Σ_m x_m."""

    def __init__(self, l: int, dim: int) -> None:
        super().__init__()
        self.l = l

    def forward(self, x: Float[Tensor, "*blocks l dim"]) -> Float[Tensor, "*blocks dim"]:
        return x.mean(-2)

    def split(self, x: Float[Tensor, "*blocks l dim"]) -> Parts:
        """φ_m(x) of every token, and r(x), in the arithmetic of x."""
        return x / self.l, torch.zeros_like(x[..., 0, :])


class LinearPool(nn.Module):
    """φ(x) = Σ_m W_m x_m, begun as the mean."""

    def __init__(self, l: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(l, dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        l, dim, _ = self.weight.shape
        self.weight.copy_(torch.eye(dim) / l)

    def forward(self, x: Float[Tensor, "*blocks l dim"]) -> Float[Tensor, "*blocks dim"]:
        return x.flatten(-2) @ self.weight.flatten(0, 1)

    def split(self, x: Float[Tensor, "*blocks l dim"]) -> Parts:
        """φ_m(x) of every token, and r(x) = 0."""
        weight = self.weight.to(x.dtype)
        return torch.einsum("...mi,mio->...mo", x, weight), torch.zeros_like(x[..., 0, :])


class MLP(nn.Module):
    """φ(x) = W₂ relu(Σ_m W₁_m (x_m + e_m)) + (1/l) Σ_m x_m, with the intra-block position encoding e.

    The mean beside it lets training begin where mean pooling is; W₂ begins at zero. There are no biases, so e alone
    belongs to no token.
    """

    def __init__(self, l: int, dim: int) -> None:
        super().__init__()
        self.l = l
        self.encoding = nn.Parameter(torch.empty(l, dim))
        self.up = nn.Parameter(torch.empty(l, dim, dim))
        self.down = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        l, dim = self.encoding.shape
        self.encoding.normal_(std=0.02)
        self.up.normal_(std=(l * dim) ** -0.5)
        self.down.zero_()

    def forward(self, x: Float[Tensor, "*blocks l dim"]) -> Float[Tensor, "*blocks dim"]:
        hidden = (x + self.encoding).flatten(-2) @ self.up.flatten(0, 1)
        return torch.relu(hidden) @ self.down + x.mean(-2)

    def split(self, x: Float[Tensor, "*blocks l dim"]) -> Parts:
        """φ_m(x) of every token, and what the position encoding adds."""
        encoding, up, down = (weight.to(x.dtype) for weight in (self.encoding, self.up, self.down))
        open_ = ((x + encoding).flatten(-2) @ up.flatten(0, 1) > 0).to(x.dtype)
        per_token = torch.einsum("...mi,mio->...mo", x, up) * open_[..., None, :]
        offset = (encoding.flatten() @ up.flatten(0, 1)) * open_
        return per_token @ down + x / self.l, offset @ down


PHI = {"mean": MeanPool, "linear": LinearPool, "mlp": MLP}


def make(kind: str, l: int, dim: int) -> nn.Module:
    """φ by its name.

    Raises:
        AnchorsError: there is no such φ.
    """
    if kind not in PHI:
        raise AnchorsError(f"There is no φ called {kind!r}.", nearest(kind, PHI))
    return PHI[kind](l, dim)
