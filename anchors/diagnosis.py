"""Which labels does a model confuse, and could one have known from its keys (3.3)?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from torch import Tensor

from anchors.attention.call import AttentionCall
from anchors.attention.seam import seam
from anchors.context import answer, encode, queries, shared_demonstrations
from anchors.errors import AnchorsError
from anchors.icl import label_probabilities, outcomes
from anchors.models import LanguageModel
from anchors.runner import Cell, Record, tokens_per_batch
from anchors.tasks.drawing import Drawn
from anchors.tasks.task import Task


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

    def see(self, call: AttentionCall) -> None:
        batch, heads, _, dim = call.q.shape
        place = self.target.to(call.q.device)[:, None, None, None].expand(-1, heads, -1, dim)
        self.found = call.q.gather(2, place).reshape(batch, heads * dim)
        self.keys, self.groups = call.k, call.groups


@dataclass(frozen=True)
class Diagnosis:
    """Predicted confusion of each pair of labels, from the keys at their label words, and the actual one.

    In one deep layer, the queries at the targets of all prompts span the directions in which the model tells its
    answers apart. Their principal components weigh the keys at the label words:

        k̂ = (components · k) ⊙ singular values
        Confusion^pred_ij = ‖k̂_{p_i} − k̂_{p_j}‖ / max_{s≠t} ‖k̂_{p_s} − k̂_{p_t}‖         (small = confusable)
        Confusion_ij = ROC AUC of p_i / p_j on the prompts whose true class is i or j

    (section 3.3, Figures 6 and 14). With several shots, k_{p_i} is the mean over the label words of class i. With
    grouped-query attention a key is repeated for each query head that reads it.

    Attributes:
        components: numbers of principal components, each of them a condition.
        layer: which layer; None takes the one two thirds up (the reference: layer 32 of 48).
    """

    kind: ClassVar[str] = "diagnose"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = False

    components: tuple[int, ...] = (10,)
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.components or min(self.components) < 1:
            raise AnchorsError(f"components = {self.components}: each must be at least 1.")

    @property
    def passes(self) -> float:
        return 1.0

    def depth(self, model: LanguageModel) -> int:
        layer = round(model.n_layers * 2 / 3) if self.layer is None else self.layer
        if not 0 <= layer < model.n_layers:
            raise AnchorsError(
                f"{model.name} has no layer {layer}.", f"It has layers 0 to {model.n_layers - 1}."
            )
        return layer

    def prepare(self, model: LanguageModel, cell: Cell) -> dict[int, list[Record]]:
        """Everything: the components depend on all prompts of the seed, so they are run together."""
        layer, prompts = self.depth(model), [d.prompt for d in cell.prompts]
        context = encode(model, shared_demonstrations(prompts))
        longest = max(len(p.ids) - p.query for p in prompts)
        size = max(1, tokens_per_batch(model, len(context.ids) / longest) // longest)
        vectors, found = [], []
        for start in range(0, len(prompts), size):
            asked = queries(prompts[start : start + size], len(context.ids), model.device)
            probe = TargetQueries(frozenset([layer]), asked.target)
            with seam(model.modules, probes=[probe]):
                probabilities = label_probabilities(answer(model, context, asked), asked)
            vectors.append(probe.found.double().cpu())
            found += outcomes(cell.task, asked, probabilities)
        keys = label_keys(probe.keys[:1], probe.groups, prompts[0].label_positions, prompts[0].label_classes)
        whole = predicted_confusion(torch.cat(vectors).numpy(), keys.double().cpu().numpy(), self.components)
        labels = cell.task.labels
        said = [
            Record(f"predicted_confusion/{labels[i]}/{labels[j]}", matrix[i, j], f"components-{m}", layer)
            for m, matrix in whole.items()
            for i, j in itertools.combinations(range(len(labels)), 2)
        ]
        # Keyed by identity of the prompt: that is what `measure` is given.
        return {-1: said} | {id(d): own for d, own in zip(cell.prompts, found, strict=True)}

    def once(self, model: LanguageModel, state: dict[int, list[Record]], cell: Cell) -> list[Record]:
        return state[-1]

    def measure(
        self, model: LanguageModel, state: dict[int, list[Record]], task: Task, batch: Sequence[Drawn]
    ) -> list[list[Record]]:
        return [state[id(d)] for d in batch]


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
        )
    pca = PCA(n_components=max(possible), svd_solver="full").fit(vectors)
    found = {}
    for m in possible:
        projected = keys @ pca.components_[:m].T * pca.singular_values_[:m]
        distance = np.linalg.norm(projected[:, None] - projected[None], axis=-1)
        if not distance.max() > 0:
            raise AnchorsError("The keys at all label words are the same.", "Check the label words.")
        matrix = distance / distance.max()
        np.fill_diagonal(matrix, 1)
        found[m] = matrix
    return found
