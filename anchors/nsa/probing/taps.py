"""Looking inside one prompt's run: a probe reads every layer's choices before they are used, a tap the flow afterwards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import entropy
from torch import Tensor

from anchors.attention.form import Call
from anchors.attention.taps import Summed
from anchors.flow.metrics import flow_sums
from anchors.flow.saliency import FlowTap
from anchors.nsa import reference
from anchors.nsa.attention import BRANCHES, CMP, SLC, Trace
from anchors.nsa.call import NSACall
from anchors.nsa.probing import metrics
from anchors.tasks.prompts import Prompt

WHERE = ("label", "last", "other")
"""Groups of positions whose gates are compared: label words, the last position, everything else."""
WHICH = ("label", "answer")
"""Groups of label words whose selection is asked for: all of them, and those of the right class."""


class Measure(NamedTuple):
    """One measured value of one prompt.

    Attributes:
        metric, value: what was measured.
        condition: the branch, group of label words or intervention it belongs to; `none` where there is none.
        layer, group, head: where; None for what is not of one.
        place: a block, for what is of one.
    """

    metric: str
    value: float
    condition: str = "none"
    layer: int | None = None
    group: int | None = None
    head: int | None = None
    place: int | None = None


@dataclass(frozen=True)
class Places:
    """The positions of a prompt that are looked at.

    Attributes:
        labels: p_k.
        answers: those of the right class.
        texts: for each label word the positions of its demonstration's text.
        controls: for each label word one of them, at random.
        target: q.
    """

    labels: Int[np.ndarray, " labels"]
    answers: Int[np.ndarray, " answers"]
    texts: tuple[Int[np.ndarray, " _"], ...]
    controls: Int[np.ndarray, " labels"]
    target: int

    @classmethod
    def of(cls, prompt: Prompt, rng: np.random.Generator) -> "Places":
        labels = np.array(prompt.label_positions, np.int64)
        classes, number = np.array(prompt.label_classes), np.array(prompt.demonstrations)
        is_text = np.array([role == "text" for role in prompt.roles])
        texts = tuple(np.flatnonzero(is_text & (number == number[p])) for p in labels)
        controls = np.array([rng.choice(text) for text in texts], np.int64)
        return cls(labels, labels[classes == prompt.gold], texts, controls, prompt.target)

    @cached_property
    def by_name(self) -> dict[str, Int[np.ndarray, " positions"]]:
        """Positions by the names of `WHERE`."""
        other = np.setdiff1d(np.arange(self.target), self.labels)
        return {"label": self.labels, "last": np.array([self.target]), "other": other}

    def weights(self, which: str, lp: int, blocks: int) -> Int[np.ndarray, " blocks"]:
        """Label words per block, for a name of `WHICH`."""
        return metrics.weights(self.labels if which == "label" else self.answers, lp, blocks)


@dataclass
class Look:
    """A probe that reads choices, patterns, gates and values of every layer; one prompt at a time.

    Attributes:
        found: the measures.
        chosen: by layer, the candidate blocks that q chose, [groups, blocks].
        idx: by layer, I_q.
        outputs: by layer, the branches' outputs and gates, for the gate saliency.
        vectors: by layer, what stands for each label word: `raw` (the value that φ reads), `compressed` (the mean over
            the compressed values that cover it), `selected` (its value in the selected branch), [labels, groups · d_v].
        read: indices of the label words whose vectors are kept.
    """

    layers: frozenset[int]
    places: Places
    most_vectors: int = 32
    found: list[Measure] = field(default_factory=list)
    chosen: dict[int, Bool[np.ndarray, "groups blocks"]] = field(default_factory=dict)
    idx: dict[int, Int[Tensor, "groups n"]] = field(default_factory=dict)
    outputs: dict[int, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict)
    vectors: dict[int, dict[str, Float[np.ndarray, "labels width"]]] = field(default_factory=dict)
    read: Int[np.ndarray, " labels"] = field(default_factory=lambda: np.zeros(0, np.int64))

    def see(self, call: Call) -> None:
        if isinstance(call, NSACall):
            found = call.trace
            for part in (self._selection, self._mass, self._gates, self._churn, self._dilution, self._recall):
                self.found += part(call, found)
            self._keep_vectors(call)
            self.outputs[call.layer] = found.branch_o, found.gates
            self.idx[call.layer] = call.idx[0, self.places.target].cpu()
            vars(call).pop(
                "trace", None
            )  # its patterns are large, and the call lives until the backward pass
        else:
            self.found += self._dense_mass(call)

    def _selection(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        """Which candidates q chose, how it ranked them, and what each label word chose of its own text."""
        g, layer, q = call.sparse.geometry, call.layer, self.places.target
        tokens, blocks = call.k.shape[2], g.blocks(call.k.shape[2])
        chosen = metrics.members(_array(call.idx)[0], blocks)
        importance = _array(found.importance)[0]
        candidate = metrics.candidates(q, tokens, g)
        self.chosen[layer] = chosen[q] & candidate
        for group, block in np.argwhere(self.chosen[layer]):
            yield Measure("chosen", 1, layer=layer, group=int(group), place=int(block))
        for which in WHICH:
            weight = self.places.weights(which, g.lp, blocks)
            for name, measure in (("auc", metrics.anchor_auc), ("rank", metrics.anchor_rank)):
                yield from _by_group(name, measure(importance[q], weight, candidate), which, layer)
            yield from _by_group(
                "anchors_per_block", _mean_where(weight, self.chosen[layer] & (weight > 0)), which, layer
            )
        rates, expected = [], []
        for p, text in zip(self.places.labels.tolist(), self.places.texts, strict=True):
            open_ = metrics.candidates(p, tokens, g)
            # Where all candidates are chosen anyway the choice says nothing.
            if metrics.chance(p, g) < 1 and (own := metrics.weights(text, g.lp, blocks) * open_).any():
                rates.append(metrics.selection_rate(chosen[p], own, open_))
                expected.append(metrics.chance(p, g))
        if rates:
            yield from _by_group("wp_rate", np.mean(rates, 0), "none", layer)
            yield Measure("wp_rate_chance", float(np.mean(expected)), layer=layer)

    def _mass(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        """Shares of the attention: of label words on their own text, of q on label words, on block(p) on p itself."""
        g, groups = call.sparse.geometry, call.k.shape[1]
        rows = torch.as_tensor([*self.places.labels, self.places.target], device=call.q.device)
        selected = _array(found.patterns[SLC][0, rows].unflatten(1, (groups, -1)).sum(2))
        yield from self._shares(selected, "slc", call.layer)
        covering = metrics.compressed_covering(call.k.shape[2], g.l, g.d) / g.l
        spread = torch.as_tensor(covering, dtype=found.o.dtype, device=call.q.device)
        over_tokens = (found.patterns[CMP][0, rows] @ spread, *(p[0, rows] for p in found.patterns[1:]))
        whole = reduce(torch.add, [found.gates[0, rows, :, c, None] * p for c, p in enumerate(over_tokens)])
        yield from self._shares(_array(whole.unflatten(1, (groups, -1)).sum(2)), "all", call.layer)
        for which in WHICH:
            positions = self.places.labels if which == "label" else self.places.answers
            here, even = metrics.purity(selected[-1], positions, self.chosen[call.layer], g.lp)
            yield from _by_group("purity", here, which, call.layer)
            yield from _by_group("purity_even", even, which, call.layer)

    def _dense_mass(self, call: Call) -> Iterator[Measure]:
        rows = torch.as_tensor([*self.places.labels, self.places.target], device=call.q.device)
        pattern = call.pattern_at(rows[None])[0].transpose(0, 1)
        return self._shares(_array(pattern.unflatten(1, (call.k.shape[1], -1)).sum(2)), "all", call.layer)

    def _shares(
        self, rows: Float[np.ndarray, "rows groups tokens"], branch: str, layer: int
    ) -> Iterator[Measure]:
        total = rows.sum(-1)
        share = rows / np.where(total > 0, total, 1)[..., None]
        own = [share[k][:, text].sum(-1) for k, text in enumerate(self.places.texts)]
        yield from _by_group("wp_mass", np.mean(own, 0), branch, layer)
        yield from _by_group("pq_mass", share[-1][:, self.places.labels].sum(-1), branch, layer)

    def _gates(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        gates = _array(found.gates)[0]
        # In parts of log 3: 1 where all branches count alike, 0 where one is all.
        evenness = entropy(gates, axis=-1) / np.log(gates.shape[-1])
        for where, positions in self.places.by_name.items():
            yield from _by_head(f"gate_{where}", gates[positions].mean(0), call.layer)
            yield Measure(f"gate_entropy_{where}", float(evenness[positions].mean()), layer=call.layer)
        yield from _by_head("gate_sd", gates.std(0), call.layer)

    def _churn(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        """J(I_t, I_{t+1}) where not all blocks are chosen anyway."""
        g = call.sparse.geometry
        start, chosen = g.n * g.lp, metrics.members(_array(call.idx)[0], g.blocks(call.k.shape[2]))
        same = metrics.jaccard(chosen[:-1], chosen[1:])
        is_label = np.isin(np.arange(len(same)), self.places.labels)
        open_ = np.arange(len(same)) >= start
        for where, mask in (("label", is_label & open_), ("other", ~is_label & open_)):
            if mask.any():
                yield from _by_group(f"jaccard_{where}", same[mask].mean(0), "none", call.layer)

    def _dilution(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        """l ‖φ_m(v)‖ / Σ_m' ‖φ_m'(v)‖: what a token keeps of its compressed values, 1 being an even share."""
        s, g, tokens = call.sparse, call.sparse.geometry, call.k.shape[2]
        if not s.kv.vc.shape[1]:
            return
        values = s.v_cmp.to(call.compute_dtype).unfold(1, g.l, g.d).transpose(-1, -2)
        with torch.no_grad():
            size = _array(s.phi_v.split(values)[0].norm(dim=-1)[0])
        total = size.sum(-1, keepdims=True)
        share = g.l * size / np.where(total > 0, total, 1)
        covering = metrics.compressed_covering(tokens, g.l, g.d)
        kept = np.zeros((tokens, size.shape[1]))
        for c in range(len(covering)):
            kept[c * g.d : c * g.d + g.l] += share[c].T
        count = covering.sum(0)
        is_label = np.isin(np.arange(tokens), self.places.labels)
        for where, mask in (("label", is_label & (count > 0)), ("other", ~is_label & (count > 0))):
            if mask.any():
                yield from _by_group(
                    f"dilution_{where}", (kept[mask] / count[mask, None]).mean(0), "none", call.layer
                )

    def _recall(self, call: NSACall, found: Trace) -> Iterator[Measure]:
        """I_q against I*_q, the blocks with most exact attention mass under the keys of the selected branch."""
        s, g, q, tokens = call.sparse, call.sparse.geometry, self.places.target, call.k.shape[2]
        home, dtype = call.q.device, call.compute_dtype
        visible = (torch.arange(tokens, device=home) <= q)[None, None, None]
        query = call.q.transpose(1, 2)[:, q : q + 1].to(dtype)
        k, v = s.kv.k_slc.to(dtype), s.kv.v_slc.to(dtype)
        pattern = reference.attention(query, k, v, visible, call.scale)[2]
        mass = metrics.over_blocks(_array(pattern[0, 0].unflatten(0, (k.shape[2], -1)).sum(1)), g.lp)
        ideal = reference.select(torch.as_tensor(mass)[None, None], geometry=g, tokens=tokens, past=q)
        best = metrics.members(_array(ideal)[0, 0], mass.shape[-1])
        own = metrics.members(_array(call.idx)[0, q], mass.shape[-1])
        candidate, layer = metrics.candidates(q, tokens, g), call.layer
        yield from _by_group("recall", metrics.recall(own, best), "none", layer)
        yield from _by_group("recall_candidates", metrics.recall(own, best, candidate), "none", layer)
        yield from _by_group("mass_recall", (mass * own).sum(-1) / (mass * best).sum(-1), "none", layer)
        importance = _array(found.importance)[0, q]
        for which in WHICH:
            weight = self.places.weights(which, g.lp, mass.shape[-1])
            yield from _by_group("anchor_recall", metrics.recall(own, best, weight * candidate), which, layer)
            drop = metrics.anchor_rank(importance, weight, candidate) - metrics.anchor_rank(
                mass, weight, candidate
            )
            yield from _by_group("rank_drop", drop, which, layer)

    def _keep_vectors(self, call: NSACall) -> None:
        s, g = call.sparse, call.sparse.geometry
        covering = metrics.compressed_covering(call.k.shape[2], g.l, g.d)[:, self.places.labels]
        inside = np.flatnonzero(covering.any(0))
        if not len(inside) or not self.most_vectors:
            return
        # Evenly over the prompt, the same ones in every layer.
        count = min(len(inside), self.most_vectors)
        self.read = inside[np.linspace(0, len(inside) - 1, count).round().astype(int)]
        at = self.places.labels[self.read]
        mean = covering[:, self.read].T / covering[:, self.read].sum(0)[:, None]
        compressed = np.einsum("pc,chd->phd", mean, _array(s.kv.vc)[0])
        self.vectors[call.layer] = {
            "raw": _flat(_array(s.v_cmp)[0, at]),
            "compressed": _flat(compressed),
            "selected": _flat(_array(s.kv.v_slc)[0, at]),
        }


class BranchTap:
    """A tap that sums the flow of every branch, and of all together; one prompt at a time.

    Attributes:
        parts: a `FlowTap` for each branch and for `all`; of a layer of full attention only `all` fires.
        measures: filled by `results`.
    """

    def __init__(self, layers: frozenset[int], places: Places, look: Look) -> None:
        self.layers, self.places, self.look = layers, places, look
        self.wanted = torch.as_tensor([*places.labels, places.target])[None]
        self.maps: frozenset[int] = frozenset()
        self.by_branch = True
        self.parts = {name: FlowTap(layers, self.wanted) for name in (*BRANCHES, "all")}
        self.supports: dict[int, dict[str, dict[str, int]]] = {}
        self.gates: list[Measure] = []

    def begin(self, call: Call, z: Tensor, dz: Tensor) -> None:
        sparse = isinstance(call, NSACall)
        for name, part in self.parts.items():
            if sparse or name == "all":
                part.begin(call, z, dz)
        if sparse:
            self._see(call, dz)

    def summed(self, call: NSACall, dz: Tensor, found: Mapping[str, Summed]) -> None:
        for name, part in self.parts.items():
            part.summed(call, dz, {"all": found[name]})
        self._see(call, dz)

    def _see(self, call: NSACall, dz: Tensor) -> None:
        self.supports[call.layer] = self._support(call)
        self.gates += self._gate_saliency(call, dz)

    def branches(self, call: NSACall, rows: slice, by_branch: dict[str, Tensor]) -> None:
        index = torch.arange(rows.start, rows.stop, device=call.q.device)
        for name, product in by_branch.items():
            self.parts[name].tile(call, index, slice(0, product.shape[-1]), product)

    def tile(self, call: Call, rows: Tensor, keys: slice, product: Tensor) -> None:
        self.parts["all"].tile(call, rows, keys, product)

    def _support(self, call: NSACall) -> dict[str, dict[str, int]]:
        g, tokens, home = call.sparse.geometry, call.k.shape[2], call.q.device
        i, j = torch.arange(tokens, device=home)[:, None], torch.arange(tokens, device=home)
        # Σ_h comes before |·|, so a pair counts as attended when any group reads it.
        masks = {
            "cmp": (i >= g.l - 1) & (j < (i - g.l + 1) // g.d * g.d + g.l),
            "slc": reference.selected_visible(call.idx, tokens, lp=g.lp)[0].any(1),
            "win": reference.window_visible(tokens, tokens, w=g.w, device=home),
        }
        labels, target = self.places.labels, self.places.target
        return {name: metrics.support(_array(mask), labels, target) for name, mask in masks.items()}

    def _gate_saliency(self, call: NSACall, dz: Tensor) -> Iterator[Measure]:
        """|g ∂L/∂g| = |g ⟨dz, o^c⟩|, mean over positions."""
        branch_o, gates = self.look.outputs.pop(call.layer)
        slope = dz.transpose(1, 2).to(gates.dtype)
        found = torch.stack([(slope * o).sum(-1) for o in branch_o], -1) * gates
        size = _array(found.abs())[0]
        for where, positions in self.places.by_name.items():
            yield from _by_head(f"gate_saliency_{where}", size[positions].mean(0), call.layer)

    def results(self) -> Iterator[Measure]:
        """S_wp, S_pq, S_ww by branch and layer; where a branch attends, coverage and the mean over attended pairs."""
        yield from self.gates
        labels = torch.as_tensor(self.places.labels)[None]
        target = torch.tensor([self.places.target])
        count = metrics.pairs(self.places.labels, self.places.target)
        for name, part in self.parts.items():
            for layer in sorted(part.rows):
                rows = part.rows[layer].cpu().double()[:, None]
                total = part.total[layer].cpu().double()[:, None]
                sums = flow_sums(rows[:, :, :-1], rows[:, :, -1], total, labels, target)
                for pair, value in (("wp", sums.s_wp), ("pq", sums.s_pq), ("ww", sums.s_ww)):
                    yield Measure(f"s_{pair}", float(value), name, layer)
                    if name == "all" or not count[pair]:
                        continue
                    attended = self.supports[layer][name][pair]
                    yield Measure(f"coverage_{pair}", attended / count[pair], name, layer)
                    if attended:
                        yield Measure(f"support_{pair}", float(value) * count[pair] / attended, name, layer)

    def certificate(self) -> float:
        """The largest relative error of Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩ over the layers."""
        error = [(float(off), float(size)) for off, size in self.parts["all"].error.values()]
        return max(off / max(size, np.finfo(float).tiny) for off, size in error)


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy()


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def _by_group(
    metric: str, values: Float[np.ndarray, " groups"], condition: str, layer: int
) -> Iterator[Measure]:
    for group, value in enumerate(values):
        if not np.isnan(value):
            yield Measure(metric, float(value), condition, layer, group)


def _by_head(metric: str, values: Float[np.ndarray, "heads 3"], layer: int) -> Iterator[Measure]:
    for (head, branch), value in np.ndenumerate(values):
        yield Measure(metric, float(value), BRANCHES[branch], layer, head=head)


def _mean_where(weight: np.ndarray, mask: Bool[np.ndarray, "groups blocks"]) -> Float[np.ndarray, " groups"]:
    count = mask.sum(-1)
    return np.where(count > 0, (mask * weight).sum(-1) / np.maximum(count, 1), np.nan)
