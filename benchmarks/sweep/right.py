"""The right value of every number, from an untouched model alone. Imports nothing of the toolkit.

Formulas: Wang et al., "Label Words are Anchors" (EMNLP 2023), sections 2.1 to 3.2; patching: Meng et al. 2022. Everything
runs whole prompts, one at a time, without a cache; only compression in families that do not see everything (windows count
what is kept) is asked of transformers' own cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.oracle import block_of, continued, entering, hiding, runs

Numbers = dict[str, Tensor]
RATE, EPOCHS = 0.01, 2
ISOLATED = 2
RULES = ("original", "after-last-anchor", "restart")


@dataclass(frozen=True)
class Asked:
    """A prompt as plain numbers: tokens, label-word positions and their classes, the tokens that stand for the classes,
    the right class, where the query begins, and which tokens of the demonstrations are anchors."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    classes: tuple[int, ...]
    label_ids: tuple[int, ...]
    gold: int
    query: int
    anchors: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Prompts on the same demonstrations.

    Attributes:
        prompts: what is asked.
        exchanged: the same prompts with exchanged label words.
        training: one prompt of each class, on the same demonstrations, to fit β on.
    """

    prompts: tuple[Asked, ...]
    exchanged: tuple[Asked, ...]
    training: tuple[Asked, ...]


def labels_of(logits: Tensor, prompt: Asked) -> Tensor:
    """The label words' logits at the target."""
    return logits[-1, list(prompt.label_ids)]


def columns(prompt: Asked) -> list[int]:
    """Where logits are compared: after the first label word, before the query, in its middle, at the target."""
    last = len(prompt.ids) - 1
    return [prompt.labels[0], prompt.query - 1, (prompt.query + last) // 2, last]


@torch.no_grad()
def logits(model: nn.Module, prompt: Asked) -> Tensor:
    return runs(model, prompt.ids)[0][columns(prompt)]


def maps(model: nn.Module, prompt: Asked) -> Tensor:
    """I_l = |Σ_h A ⊙ ∂L/∂A| without its diagonal, [layers, tokens, tokens]."""
    found, seen = runs(model, prompt.ids)
    loss = F.cross_entropy(labels_of(found, prompt)[None], torch.tensor([prompt.gold]))
    slopes = torch.autograd.grad(loss, seen.patterns, allow_unused=True)
    length = len(prompt.ids)
    flows = []
    for pattern, slope in zip(seen.patterns, slopes, strict=True):
        product = torch.zeros_like(pattern) if slope is None else pattern * slope
        flows.append(product[0, :, :, :length].sum(0).abs().fill_diagonal_(0).detach())
    return torch.stack(flows)


def sums(flow: Tensor, prompt: Asked) -> Tensor:
    """S_wp, S_pq and S_ww of each layer, [3, layers], as loops over pairs."""
    target, found = len(prompt.ids) - 1, []
    for layer in flow.double().tolist():
        total, count = [0.0, 0.0, 0.0], [0, 0, 0]
        for i in range(target + 1):
            for j in range(i):
                which = 0 if i in prompt.labels else 1 if i == target and j in prompt.labels else 2
                total[which] += layer[i][j]
                count[which] += 1
        found.append([t / max(n, 1) for t, n in zip(total, count, strict=True)])
    return torch.tensor(found, dtype=torch.float64).T


@torch.no_grad()
def answers(model: nn.Module, prompts: Sequence[Asked]) -> Tensor:
    """Label probabilities of whole prompts."""
    return torch.stack([labels_of(runs(model, p.ids)[0], p).softmax(-1) for p in prompts])


@torch.no_grad()
def isolated(model: nn.Module, prompts: Sequence[Asked], layers: Sequence[int]) -> Tensor:
    """Label probabilities with A(p, i) = 0 for i < p before the softmax of some layers, at the label words p."""

    found = []
    for p in prompts:
        cut = torch.zeros(len(p.ids), len(p.ids), dtype=torch.bool)
        for at in p.labels:
            cut[at] = True
            cut[at, at] = False  # all that is left of its row, whether or not a sparse index chose it
        change = hiding(lambda layer, cut=cut: cut if layer in layers else None)
        found.append(labels_of(runs(model, p.ids, before=change)[0], p).softmax(-1))
    return torch.stack(found)


@torch.no_grad()
def readout(model: nn.Module, prompts: Sequence[Asked]) -> Tensor:
    """Σ_h Σ_{k: class of p_k is i} A(q, p_k), [prompts, layers, classes]."""
    found = []
    for p in prompts:
        _, seen = runs(model, p.ids)
        rows = [(a * s)[0, :, -1].sum(0) for a, s in zip(seen.patterns, seen.shares, strict=True)]
        found.append(
            [
                [float(sum(row[at] for at, own in zip(p.labels, p.classes, strict=True) if own == c)) for c in range(len(p.label_ids))]
                for row in rows
            ]
        )  # fmt: skip
    return torch.tensor(found, dtype=torch.float64)


def reweighted(model: nn.Module, prompt: Asked, beta: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """The label words' logits with Â(q, p) = exp(β) A(q, p); `order` is the prompt's p by column of β."""

    def after(layer: int, pattern: Tensor) -> Tensor:
        factor = torch.ones_like(pattern)
        index = (
            torch.tensor([0]),
            torch.arange(pattern.shape[1])[:, None],
            torch.tensor(len(prompt.ids) - 1),
            torch.tensor(order),
        )
        return pattern * factor.index_put(index, beta[layer].to(pattern.dtype).exp())

    return labels_of(runs(model, prompt.ids, after=after)[0], prompt)


def in_order(prompt: Asked, classes: Sequence[int]) -> list[int]:
    """The n-th label word of each class for the n-th time that the class is named."""
    waiting = {
        c: [p for p, own in zip(prompt.labels, prompt.classes, strict=True) if own == c] for c in set(classes)
    }
    return [waiting[c].pop(0) for c in classes]


def fitted(model: nn.Module, group: Group) -> Numbers:
    """β after two steps of Adam on all training prompts at once: losses, β itself, label probabilities."""
    with torch.no_grad():
        _, seen = runs(model, group.training[0].ids)
    dtype, classes = seen.patterns[0].dtype, group.training[0].classes
    beta = [torch.zeros(p.shape[1], len(classes), dtype=dtype, requires_grad=True) for p in seen.patterns]
    optimiser, losses = torch.optim.Adam(beta, lr=RATE), []
    for _ in range(EPOCHS):
        optimiser.zero_grad()
        all_losses = [
            F.cross_entropy(reweighted(model, p, beta, in_order(p, classes))[None], torch.tensor([p.gold]))
            for p in group.training
        ]
        loss = torch.stack(all_losses).mean()
        loss.backward()
        losses.append(loss.detach())
        optimiser.step()
    with torch.no_grad():
        changed = [reweighted(model, p, beta, in_order(p, classes)).softmax(-1) for p in group.prompts]
    return {
        "losses": torch.stack(losses),
        "beta": torch.cat([b.detach().flatten() for b in beta]),
        "probabilities": torch.stack(changed),
    }


@torch.no_grad()
def sees_all(model: nn.Module, prompt: Asked) -> bool:
    """Whether every token before it is seen by every token of the query, in every layer."""
    future = ~torch.ones(len(prompt.ids), len(prompt.ids), dtype=torch.bool).tril()
    rows = [
        (own[:, : len(prompt.ids)] | future)[prompt.query :] for own in runs(model, prompt.ids)[1].visible
    ]
    return all(bool(own.all()) for own in rows)


@torch.no_grad()
def compressed(model: nn.Module, prompt: Asked, rule: str, first: int | None) -> Tensor:
    """Label probabilities when only the anchors' keys and values are kept; the query stands where the rule says.

    A family that sees everything: the whole prompt, with the dropped tokens hidden from the query. Others, in which a
    window counts what is kept: transformers' own cache, cut.

    Args:
        first: the position of a prompt's first token; None for a model that hears no positions, which has a right value
            only under the rule `original`, or under every rule if it has no positions at all.
    """
    if rule != "original" and first is None and not _without_positions(model, prompt):
        raise ValueError("this rule cannot be heard: other positions change no logit")
    start = {"original": prompt.query, "restart": 0}.get(rule, prompt.anchors[-1] + 1)
    after = None
    if rule != "original" and first is not None:
        after = [first + start + i for i in range(len(prompt.ids) - prompt.query)]
    if sees_all(model, prompt):
        where = None if after is None else [*range(first, first + prompt.query), *after]
        return labels_of(
            runs(model, prompt.ids, where, before=hiding(lambda _: _dropped(prompt)))[0], prompt
        ).softmax(-1)
    if first is not None and after is None:
        after = [first + i for i in range(prompt.query, len(prompt.ids))]
    whole = runs(model, prompt.ids)[0][prompt.query :]
    plain = not _indexed(model, prompt)
    alike = continued(model, prompt.ids[: prompt.query], prompt.ids[prompt.query :], plain=plain)
    if not torch.allclose(alike, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise ValueError("going on with transformers' own cache changes the logits: no right value")
    out = continued(
        model, prompt.ids[: prompt.query], prompt.ids[prompt.query :], prompt.anchors, after, plain
    )
    return labels_of(out, prompt).softmax(-1)


def _indexed(model: nn.Module, prompt: Asked) -> bool:
    """Whether layers need a cache of their own kind."""
    ids = torch.tensor([prompt.ids])
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return any("Indexed" in type(layer).__name__ for layer in cache.layers)


def _dropped(prompt: Asked) -> Tensor:
    hidden = torch.zeros(len(prompt.ids), len(prompt.ids), dtype=torch.bool)
    hidden[prompt.query :, [i for i in range(prompt.query) if i not in prompt.anchors]] = True
    return hidden


def _without_positions(model: nn.Module, prompt: Asked) -> bool:
    """Whether it matters only what is kept, and not where it stood."""
    cut = continued(model, prompt.ids[: prompt.query], prompt.ids[prompt.query :], prompt.anchors, plain=True)
    whole = runs(model, prompt.ids, before=hiding(lambda _: _dropped(prompt)))[0][prompt.query :]
    return torch.allclose(cut, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@torch.no_grad()
def entered(model: nn.Module, ids: Sequence[int], block: str) -> Tensor:
    """What enters a layer: the residual stream, [batch, tokens, width], or several of them in one tensor."""
    kept: list[Tensor] = []
    with entering(model, block, lambda x: kept.append(x) or x):
        runs(model, ids)
    return kept[0]


def streams_first(state: Tensor, tokens: int) -> Tensor:
    """What enters a layer as [streams, tokens, width], a view, wherever a family puts its streams; the batch is of one."""
    at = state.shape.index(tokens)
    return state.movedim(at, -2).flatten(end_dim=-3) if state.dim() > 2 else state[None]


@torch.no_grad()
def patched(model: nn.Module, own: Asked, other: Asked, blocks: Sequence[str], one: bool = False) -> Numbers:
    """Label words' centred logits of A, of B, and of A with B's residual stream at the label words before a layer.

    Args:
        one: of several streams, exchange the first one alone.
    """

    def centred(found: Tensor) -> Tensor:
        z = labels_of(found, own).double()
        return z - z.mean()

    def asked(
        ids: Sequence[int], block: str | None = None, change: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        if block is None:
            return runs(model, ids)[0]
        with entering(model, block, change):
            return runs(model, ids)[0]

    a, b, where = centred(asked(own.ids)), centred(asked(other.ids)), list(own.labels)
    gap = b - a
    found = {"denominator": gap.square().sum()}
    for layer, block in enumerate(blocks):
        theirs = streams_first(entered(model, other.ids, block), len(other.ids))

        def swap(x: Tensor, theirs: Tensor = theirs) -> Tensor:
            x = x.clone()
            ours = streams_first(x, len(own.ids))
            which = slice(1 if one else len(ours))
            ours[which, where] = theirs[which, where]
            return x

        z = centred(asked(own.ids, block, swap))
        found[f"numerator/{layer}"] = ((z - a) * gap).sum()
        found[f"shift/{layer}"] = (z.softmax(-1) - a.softmax(-1)).abs().sum() / 2
        found[f"stream/{layer}"] = (z - b).norm() / gap.norm()
    return found


def places(model: nn.Module, prompt: Asked) -> tuple[list[int], int]:
    """The layer of each attention call, counted in the model's list of layers, and how many there are. Where no layer of the list
    goes without attention, calls are counted."""
    names = blocks(model, prompt)
    layers = model.get_submodule(names[0].rpartition(".")[0]) if names[0][-1:].isdigit() else ()
    if len(set(names)) == len(names) < len(layers):
        return [int(name.rpartition(".")[2]) for name in names], len(layers)
    return list(range(len(names))), len(names)


def blocks(model: nn.Module, prompt: Asked) -> list[str]:
    """The layers in which attention was called, in order."""
    with torch.no_grad():
        return [block_of(name) for name in runs(model, prompt.ids)[1].names]
