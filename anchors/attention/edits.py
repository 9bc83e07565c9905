"""What can change the attention at the seam: a bias before the softmax, a weight after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from anchors.attention.call import AttentionCall

Field = Callable[[AttentionCall], Float[Tensor, "*batch #heads query key"]]


@dataclass(frozen=True)
class Edit:
    """A change of the attention in the layers it names.

        A' = softmax(scores + mask + bias) ⊙ weight

    Attributes:
        layers: where it applies; each of them must be reached, or leaving the seam is an error.
        bias: function from the call to what is added to the scores, broadcastable to [batch, heads, query, key];
            -inf removes an entry and renormalises the row.
        weight: function from the call to what multiplies the pattern; the row is not renormalised.
        name: what the edit is called in errors.
        neutral: whether it may leave every entry as it was (a β of 0, say). Otherwise an edit that changes no
            visible entry of a layer is an error too: it was aimed at nothing.
    """

    layers: frozenset[int]
    bias: Field | None = None
    weight: Field | None = None
    name: str = "edit"
    neutral: bool = False


def ban(layers: Iterable[int], query: Tensor, key: Tensor, name: str = "ban") -> Edit:
    """Set A(query, key) to zero before the softmax, for pairs of positions given per example.

    Args:
        layers: where.
        query, key: [batch, pairs] integer positions; a negative entry is no pair (for ragged batches).
    """

    def bias(call: AttentionCall) -> Tensor:
        field = torch.zeros(call.q.shape[0], 1, call.q.shape[2], call.k.shape[2], device=call.q.device)
        real = ((query >= 0) & (key >= 0)).nonzero(as_tuple=True)
        field[real[0], 0, query[real], key[real]] = -torch.inf
        return field

    return Edit(layers=frozenset(layers), bias=bias, name=name)
