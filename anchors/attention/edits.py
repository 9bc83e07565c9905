"""What can change the attention at the seam: a bias before the softmax, a weight after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anchors.attention.form import Call, boolean
from anchors.errors import AnchorsError

Field = Callable[[Call], Float[Tensor, "*batch #heads query key"]]


@dataclass(frozen=True)
class Edit:
    """A change of the attention in the layers it names.

        A' = softmax(scores + mask + bias) ⊙ weight

    Attributes:
        layers: where it applies; each of them must be reached, or leaving the seam is an error.
        bias: function from the call to what is added to the scores, broadcastable to [batch, heads, query, key];
            -inf removes an entry and renormalises the row.
        weight: function from the call to what multiplies the pattern; the row is not renormalised.
        shown: function from the call to booleans, True at entries that are seen although the model's own mask may hide
            them: a sparse index that had to choose among what the bias leaves would choose them.
        name: what the edit is called in errors.
        neutral: whether it may leave every entry as it was (a β of 0, say). Otherwise an edit that changes no
            visible entry of a layer is an error too: it was aimed at nothing.
    """

    layers: frozenset[int]
    bias: Field | None = None
    weight: Field | None = None
    name: str = "edit"
    neutral: bool = False
    shown: Callable[[Call], Tensor] | None = None

    def bias_of(self, call: Call, visible: Tensor | None) -> Float[Tensor, "*all #query #key"] | None:
        """The bias, having made sure that it touches an entry that can be seen.

        Raises:
            AnchorsError: it changes nothing, and the edit is not `neutral`.
        """
        if self.bias is None:
            return None
        bias = self.bias(call).to(call.q.device, call.compute_dtype)
        self._demand_effect(call, bias, 0, visible)
        return bias

    def weight_of(self, call: Call, visible: Tensor | None) -> Float[Tensor, "*all #query #key"] | None:
        """The weight; the same check."""
        if self.weight is None:
            return None
        weight = self.weight(call).to(call.q.device, call.compute_dtype)
        self._demand_effect(call, weight, 1, visible)
        return weight

    def showing(self, call: Call, visible: Tensor | None) -> Tensor | None:
        """The mask with what the edit shows."""
        if visible is None or self.shown is None:
            return visible
        new = self.shown(call) & ~boolean(visible)
        return visible | new if visible.dtype == torch.bool else torch.where(new, 0, visible)

    def _demand_effect(self, call: Call, field: Tensor, nothing: int, visible: Tensor | None) -> None:
        if self.neutral:
            return
        entries = field != nothing
        if visible is not None:
            entries = entries & boolean(visible)
        if not entries.any():
            raise AnchorsError(
                f"{self.name!r} fired in layer {call.layer} but changed nothing: every entry it names is masked anyway.",
                "Check its positions (a sliding window may hide them), or declare the edit neutral.",
                code="without-effect",
            )


def ban(layers: Iterable[int], query: Tensor, key: Tensor, name: str = "ban") -> Edit:
    """Set A(query, key) to zero before the softmax, for pairs of positions given per example.

    Args:
        layers: where.
        query, key: [batch, pairs] integer positions in the prompt; a negative entry is no pair (for ragged
            batches). Queries that stand in a cache are out of reach: an error.
    """

    def bias(call: Call) -> Tensor:
        home = call.q.device
        field = torch.zeros(call.q.shape[0], 1, call.q.shape[2], call.k.shape[2], device=home)
        q, k = query.to(home), key.to(home)
        real = ((q >= 0) & (k >= 0)).nonzero(as_tuple=True)
        field[real[0], 0, _rows(call, q[real], name), k[real]] = -torch.inf
        return field

    return Edit(layers=frozenset(layers), bias=bias, name=name)


def isolate(layers: Iterable[int], positions: Tensor, name: str = "isolation") -> Edit:
    """Let some positions see nothing but themselves: A(p, i) = 0 for i < p, before the softmax (2.2).

    Args:
        layers: where.
        positions: [batch, positions] in the prompt; a negative entry is none.
    """

    def bias(call: Call) -> Tensor:
        home = call.q.device
        field = torch.zeros(call.q.shape[0], 1, call.q.shape[2], call.k.shape[2], device=home)
        example, p, rows = chosen(call)
        before = torch.arange(call.k.shape[2], device=field.device) < p[:, None]
        field[example, 0, rows] = torch.where(before, -torch.inf, 0.0)
        return field

    def chosen(call: Call) -> tuple[Tensor, Tensor, Tensor]:
        home = positions.to(call.q.device)
        example, which = (home >= 0).nonzero(as_tuple=True)
        p = home[example, which]
        return example, p, _rows(call, p, name)

    def itself(call: Call) -> Tensor:
        shape = (call.q.shape[0], 1, call.q.shape[2], call.k.shape[2])
        field = torch.zeros(shape, dtype=torch.bool, device=call.q.device)
        example, p, rows = chosen(call)
        field[example, 0, rows, p] = True
        return field

    return Edit(layers=frozenset(layers), bias=bias, name=name, shown=itself)


def scale(
    layers: Iterable[int],
    query: Tensor,
    key: Tensor,
    log_factor: Callable[[int], Tensor],
    name: str = "scale",
) -> Edit:
    """Multiply A(query, key) by exp(log_factor) after the softmax, without renormalising (3.1).

    Args:
        layers: where.
        query: [batch], one position of each example.
        key: [batch, positions].
        log_factor: from a layer to the β of its heads and positions, [heads, positions].
    """

    def weight(call: Call) -> Tensor:
        home = call.q.device
        beta = log_factor(call.layer).to(home)
        batch, heads, rows, keys = call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2]
        field = torch.ones(batch, heads, rows, keys, dtype=beta.dtype, device=beta.device)
        row = _rows(call, query.to(home), name)
        example = torch.arange(batch, device=beta.device)[:, None]
        # Indexed as [batch, positions, heads]: the two index lists come first.
        factors = beta.exp().T.expand(batch, -1, -1)
        return (
            field.permute(0, 2, 3, 1)
            .index_put((example, row[:, None], key.to(home)), factors)
            .permute(0, 3, 1, 2)
        )

    return Edit(layers=frozenset(layers), weight=weight, name=name, neutral=True)


def _rows(call: Call, positions: Tensor, name: str) -> Tensor:
    """Positions in the prompt as query rows of this call."""
    rows = positions - call.past
    if (rows < 0).any():
        raise AnchorsError(
            f"{name!r} names query positions below {call.past}, which were run before: their keys and values "
            "are in the cache.",
            "Run the demonstrations inside the seam, with the edit.",
            code="without-effect",
        )
    return rows
