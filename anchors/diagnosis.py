"""Which labels does a model confuse, and could one have known from its keys (3.3)?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from torch import Tensor

from anchors._names import forwarding
from anchors.attention.form import Call
from anchors.errors import AnchorsError


@dataclass
class TargetQueries:
    """A probe that keeps the query vectors at each example's target, all heads concatenated, and the keys there are.

    The keys are those of the attention, not of the cache, which holds latent ones in some families (DeepSeek) and
    none in layers that read those of an earlier one.

    Attributes:
        layers: the one layer where it looks.
        target: q of each example, as a row of the call's queries.
        found: [batch, heads · dim].
        keys: [batch, kv_heads, tokens, dim].
        groups: query heads per key-value head.
    """

    layers: frozenset[int]
    target: Int[Tensor, " batch"]

    def see(self, call: Call) -> None:
        batch, heads, _, dim = call.q.shape
        place = self.target.to(call.q.device)[:, None, None, None].expand(-1, heads, -1, dim)
        self.found = call.q.gather(2, place).reshape(batch, heads * dim)
        self.keys, self.groups = call.k, call.groups


def label_keys(
    keys: Float[Tensor, "1 kv_heads tokens dim"],
    groups: int,
    positions: Sequence[int],
    classes: Sequence[int],
) -> Float[Tensor, "classes width"]:
    """The key of each class in one layer: mean over its label-word positions, as wide as the queries.

    Of a layer of native sparse attention it is the key of the selected branch.

    Args:
        keys: of the layer's attention.
        groups: query heads per key-value head.
        positions, classes: of the label words.
    """
    wide = keys[0].repeat_interleave(groups, dim=0)
    flat = wide[:, list(positions)].transpose(0, 1).flatten(1)
    return torch.stack(
        [flat[[i for i, own in enumerate(classes) if own == c]].mean(0) for c in sorted(set(classes))]
    )


def predicted_confusion(
    vectors: Float[np.ndarray, "prompts width"],
    keys: Float[np.ndarray, "classes width"],
    components: Sequence[int],
) -> dict[int, Float[np.ndarray, "classes classes"]]:
    """Confusion^pred for each number of principal components; the diagonal is 1.

    Numbers above what the queries can span (prompts or width) are left out.

    Raises:
        AnchorsError: none is left, or all keys are the same.
    """
    most = min(vectors.shape)
    possible = [m for m in components if m <= most]
    if not possible:
        raise AnchorsError(
            f"{min(components)} components cannot be fitted on {len(vectors)} queries of width {vectors.shape[1]}.",
            f"Use at most {most}, or more --examples.",
            code="too-few",
        )
    pca = PCA(n_components=max(possible), svd_solver="full").fit(vectors)
    found = {}
    for m in possible:
        projected = keys @ pca.components_[:m].T * pca.singular_values_[:m]
        distance = np.linalg.norm(projected[:, None] - projected[None], axis=-1)
        if not distance.max() > 0:
            raise AnchorsError(
                "The keys at all label words are the same.", "Check the label words.", code="label-words"
            )
        matrix = distance / distance.max()
        np.fill_diagonal(matrix, 1)
        found[m] = matrix
    return found


__getattr__ = forwarding(__name__)
