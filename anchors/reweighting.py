"""Anchor re-weighting (3.1): learn how much the target should attend to each label word."""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anchors._names import forwarding
from anchors.attention.edits import Edit, scale
from anchors.attention.seam import seam
from anchors.context import Context, encode, on_context
from anchors.errors import AnchorsError, parsed
from anchors.model.language import LanguageModel
from anchors.model.preparation import apply, is_plain_linear, wide_products
from anchors.streams import Stream, stream
from anchors.study.analysis import Cell
from anchors.study.results import write_atomic
from anchors.tasks.drawing import demonstrations
from anchors.tasks.prompts import Prompt, build

NAME = "re-weighting"


@dataclass(frozen=True)
class Beta:
    """Fitted β and what it belongs to.

    Attributes:
        beta: [layers, heads, label words]; 0 beyond the heads of a layer that has fewer than another one.
        classes: the class of each label word, in the order of the last axis.
        losses: mean training loss of each epoch, in nats.
        facts: provenance, when loaded from a file.
        heads: how many each layer has; by default as many as the second axis of `beta`.
    """

    beta: Float[Tensor, "layers heads labels"]
    classes: tuple[int, ...]
    losses: tuple[float, ...] = ()
    facts: dict | None = None
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", self.heads or (self.beta.shape[1],) * self.beta.shape[0])

    def demand(self, model: LanguageModel) -> None:
        """Refuse a model that it was not fitted on.

        Raises:
            AnchorsError: other layers or heads, or another identity (see `anchors.model.identity`).
        """
        fitted = (self.facts or {}).get("fingerprint")
        name = (self.facts or {}).get("model", "an unknown model")
        if self.heads != model.heads:
            own, other = _counted(self.heads), _counted(model.heads)
            raise AnchorsError(
                f"This β has {own} and was fitted on {name}; {model.name} has {other}.",
                "Fit it on the model it is to be applied to.",
                code="beta",
            )
        if fitted and len(fitted) < 32:
            raise AnchorsError(
                f"This β was fitted on {name} by an earlier version of label-anchors, which looked at a sample of the weights only: "
                "it cannot be told whether this is the same model.",
                "Fit it again.",
                code="beta",
            )
        if fitted and fitted != model.fingerprint:
            raise AnchorsError(
                f"This β was fitted on {name} with other weights, adapters, configuration or tokenizer than {model.name} has.",
                "Fit it on the model it is to be applied to.",
                code="beta",
            )

    def edit(self, prompts: Sequence[Prompt], device: torch.device | str) -> Edit:
        """The edit that applies it to prompts that show the same number of label words of each class.

        Raises:
            AnchorsError: a prompt shows others.
        """
        columns = torch.tensor([self._columns(p) for p in prompts], device=device)
        target = torch.tensor([p.target for p in prompts], device=device)
        return scale(
            _attending(self.heads), target, columns, _by_layer(self.beta.to(device), self.heads), NAME
        )

    def _columns(self, prompt: Prompt) -> list[int]:
        """The label-word positions of a prompt in this β's order: the n-th of a class goes to the n-th of it."""
        waiting = {
            c: [p for p, own in zip(prompt.label_positions, prompt.label_classes, strict=True) if own == c]
            for c in set(self.classes)
        }
        if sorted(self.classes) != sorted(prompt.label_classes):
            raise AnchorsError(
                f"β was fitted for label words of the classes {sorted(self.classes)}, "
                f"the prompt shows {sorted(prompt.label_classes)}.",
                "Use the shots, task and label policy it was fitted with.",
                code="beta",
            )
        return [waiting[c].pop(0) for c in self.classes]

    def save(self, path: Path, facts: dict) -> None:
        """Write β as safetensors, with its provenance in the header."""
        header = {
            "label-anchors": json.dumps(facts),
            "classes": json.dumps(self.classes),
            "heads": json.dumps(self.heads),
            "losses": json.dumps(self.losses),
        }
        write_atomic(path, lambda draft: save_file({"beta": self.beta.contiguous().cpu()}, draft, header))

    @classmethod
    def load(cls, path: Path) -> "Beta":
        """Read what `save` wrote."""
        try:
            with safe_open(path, "pt") as file:
                header, beta = file.metadata() or {}, file.get_tensor("beta")
            classes = tuple(parsed(header["classes"]))
            heads = tuple(parsed(header.get("heads", "[]")))
            losses, facts = tuple(parsed(header["losses"])), parsed(header["label-anchors"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise AnchorsError(
                f"{str(path)!r} does not hold a fitted β: {error}",
                "Where it lies in a run's folder, remove that: β is fitted anew, and its rows are measured anew.",
                code="beta",
            ) from error
        if not torch.isfinite(beta).all():
            raise AnchorsError(
                f"The β in {str(path)!r} is not finite.",
                "Where it lies in a run's folder, remove that: β is fitted anew, and its rows are measured anew.",
                code="beta",
            )
        return cls(beta, classes, losses, facts, heads)


def training_prompts(model: LanguageModel, cell: Cell, per_class: int) -> list[Prompt]:
    """Extra examples of each class, as prompts on the demonstrations of a seed; none shown there or asked about."""
    shown = demonstrations(cell.task, cell.data, cell.how)
    texts = {e.text for e in shown} | cell.data.repeated
    rng = stream(Stream.TRAINING_EXAMPLES, cell.how.seed)
    chosen = []
    for c, label in enumerate(cell.task.labels):
        pool = [e for e in cell.data.train_by_class.get(c, []) if e.text not in texts]
        if len(pool) < per_class:
            raise AnchorsError(
                f"Beside the demonstrations there are {len(pool)} training examples of {label!r}, not {per_class}.",
                "Use fewer examples per class.",
                code="too-few",
            )
        chosen += [pool[int(i)] for i in rng.choice(len(pool), per_class, replace=False)]
    positions = cell.prompts[0].prompt.label_positions  # a control may have moved them
    return [
        replace(build(cell.task, model.tokenizer, shown, e.text, e.label), label_positions=positions)
        for e in chosen
    ]


def fit(
    model: LanguageModel,
    context: Context,
    prompts: Sequence[Prompt],
    learning_rate: float = 0.01,
    epochs: int = 10,
    batch: int = 1,
    seed: int = 0,
) -> Beta:
    """Train β with steps of one token.

    Only the target's row depends on β, so the keys and values of everything before the target are computed once per
    example, and a step is the forward and backward pass of the last token. Its literal twin is `literal_fit`.
    """
    beta = new_beta(model, prompts[0])
    with label_head(model, prompts[0].label_ids):
        # A step writes over recurrent states, which its gradient would read: there prompts are run whole.
        again = replace(model, carries=False) if any(context.states) else model
        start, shared = (0, None) if again is not model else (len(context.ids), context)
        held = [encode(again, p.ids[start:-1], shared) for p in prompts]
        asked = [last(model, p) for p in prompts]
        own = lambda i: one_token_slope(model, held[i], beta, *asked[i])  # noqa: E731
        return _train(beta, model, prompts, learning_rate, epochs, batch, seed, own)


def new_beta(model: LanguageModel, prompt: Prompt) -> nn.Parameter:
    """β = 0 for the label words of a prompt, [layers, heads, labels]: it changes nothing.

    Where layers have different numbers of heads, it has the largest, and what is beyond a layer's own stays 0.
    """
    shape = (model.n_layers, max(model.heads), len(prompt.label_positions))
    return nn.Parameter(torch.zeros(shape, device=model.device))


def _by_layer(
    beta: Float[Tensor, "layers heads labels"], heads: Sequence[int]
) -> Callable[[int], Float[Tensor, "own_heads labels"]]:
    return lambda layer: beta[layer, : heads[layer]]


def _attending(heads: Sequence[int]) -> list[int]:
    return [layer for layer, own in enumerate(heads) if own]


def _counted(heads: Sequence[int]) -> str:
    counts = sorted({own for own in heads if own})
    return f"{len(_attending(heads))} layers of {' or '.join(map(str, counts))} heads"


def one_token_loss(
    model: LanguageModel, before: Context, prompt: Prompt, beta: Float[Tensor, "layers heads labels"]
) -> Float[Tensor, ""]:
    """The loss of one example from the cache of all tokens but the target; differentiable in β.

    Inside `label_head`, so that the logits are those of the label words.
    """
    return _loss_of_last(model, before, beta, *last(model, prompt))


def last(model: LanguageModel, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt's last token [1, 1], the positions of its label words, and its right class [1]."""
    given = [[prompt.ids[-1]]], prompt.label_positions, [prompt.gold]
    last, columns, gold = (torch.tensor(x, device=model.device) for x in given)
    return last, columns, gold


def _loss_of_last(
    model: LanguageModel, before: Context, beta: Tensor, last: Tensor, columns: Tensor, gold: Tensor
) -> Float[Tensor, ""]:
    """`one_token_loss`; waits for the GPU nowhere."""
    edit = _row_edit(columns, len(before.ids) + 1, beta, model.heads)
    with torch.enable_grad(), seam(model.modules, edits=[edit]):
        logits = model.logits(last, torch.zeros(1, dtype=torch.long, device=model.device), before)[:, 0]
    return F.cross_entropy(_wide(logits), gold.to(logits.device))


def one_token_slope(
    model: LanguageModel, before: Context, beta: Tensor, *asked: Tensor
) -> tuple[Float[Tensor, ""], Float[Tensor, "layers heads labels"]]:
    """`one_token_loss` of what `last` says of an example, and its gradient in β; on CUDA one order, see `on_context`."""

    def step(context: Context, beta: Tensor, *asked: Tensor) -> tuple[Tensor, Tensor]:
        own = beta.detach().requires_grad_()
        loss = _loss_of_last(model, context, own, *asked)
        return loss.detach(), torch.autograd.grad(loss, own)[0]

    loss, slope = on_context(model, "step", before, step, (beta.detach(), *asked))
    return loss, slope


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: where a prediction is sure, 1 − p is lost below."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def literal_loss(
    model: LanguageModel, prompt: Prompt, beta: Float[Tensor, "layers heads labels"]
) -> Float[Tensor, ""]:
    """The same loss from the whole prompt and the whole vocabulary, as the definition says."""
    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.enable_grad(), seam(model.modules, edits=[_edit(prompt, beta, model.heads)]):
        logits = model.model(input_ids=ids, use_cache=False).logits[:, -1, list(prompt.label_ids)]
    return F.cross_entropy(_wide(logits), torch.tensor([prompt.gold], device=logits.device))


def literal_fit(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    learning_rate: float = 0.01,
    epochs: int = 10,
    batch: int = 1,
    seed: int = 0,
) -> Beta:
    """`fit` with whole prompts in every step: the twin it is compared with."""
    beta = new_beta(model, prompts[0])

    def slope(i: int) -> tuple[Tensor, Tensor]:
        loss = literal_loss(model, prompts[i], beta)
        return loss.detach(), torch.autograd.grad(loss, beta)[0]

    return _train(beta, model, prompts, learning_rate, epochs, batch, seed, slope)


def _edit(prompt: Prompt, beta: Float[Tensor, "layers heads labels"], heads: Sequence[int]) -> Edit:
    target = torch.tensor([prompt.target], device=beta.device)
    columns = torch.tensor([prompt.label_positions], device=beta.device)
    return scale(_attending(heads), target, columns, _by_layer(beta, heads), NAME)


def _row_edit(
    columns: Int[Tensor, " labels"],
    tokens: int,
    beta: Float[Tensor, "layers heads labels"],
    heads: Sequence[int],
) -> Edit:
    """`_edit` where the target's row is all that is run: the rows of all layers are made at once."""
    ones = beta.new_ones(*beta.shape[:2], 1, tokens)
    rows = ones.index_copy(3, columns, beta.exp()[:, :, None]).unbind()
    return Edit(
        frozenset(_attending(heads)),
        weight=lambda call: rows[call.layer][: heads[call.layer]],
        name=NAME,
        neutral=True,
    )


def _train(
    beta: nn.Parameter,
    model: LanguageModel,
    prompts: Sequence[Prompt],
    learning_rate: float,
    epochs: int,
    batch: int,
    seed: int,
    slope_of: Callable[[int], tuple[Tensor, ...]],
) -> Beta:
    """Adam over the examples in a seeded order, anew in every epoch; `slope_of` gives an example's loss and its gradient."""
    optimiser = torch.optim.Adam([beta], lr=learning_rate)
    rng = stream(Stream.TRAINING_ORDER, seed)
    losses = []
    for _ in range(epochs):
        order = rng.permutation(len(prompts))
        seen = []
        for start in range(0, len(order), batch):
            found = [slope_of(int(i)) for i in order[start : start + batch]]
            beta.grad = torch.stack([slope for _, slope in found]).mean(0)
            seen += [loss for loss, _ in found]
            optimiser.step()
        losses.append(float(np.mean(torch.stack(seen).tolist())))
    if not np.isfinite(losses).all() or not torch.isfinite(beta).all():
        raise AnchorsError(
            f"The training of β diverged: losses {[round(x, 3) for x in losses]}.",
            "Lower the learning rate, or use --precision float32.",
            code="diverged",
        )
    return Beta(beta.detach(), tuple(prompts[0].label_classes), tuple(losses), heads=model.heads)


@contextmanager
def label_head(model: LanguageModel, label_ids: Sequence[int]) -> Generator[None]:
    """Let the model compute the logits of the label words only: the output matrix is cut to their rows.

    What a family does to its logits afterwards (a factor, a soft cap) acts entry by entry and stays the same.
    """
    whole = model.model.get_output_embeddings()
    rows = torch.tensor(list(label_ids), device=model.device)
    plain = is_plain_linear(whole) and not whole._forward_hooks and "_hf_hook" not in vars(whole)
    cut = _rows_of(whole, rows) if plain else _Chosen(whole, rows)
    if plain and model.model.dtype in (torch.bfloat16, torch.float16):
        apply(wide_products(cut))
    model.model.set_output_embeddings(cut)
    try:
        yield
    finally:
        model.model.set_output_embeddings(whole)


def _rows_of(whole: nn.Linear, rows: Int[Tensor, " labels"]) -> nn.Linear:
    """A plain output matrix cut to some of its rows."""
    cut = nn.Linear(whole.in_features, len(rows), bias=whole.bias is not None, device="meta")
    cut.weight = nn.Parameter(whole.weight.detach()[rows.to(whole.weight.device)], requires_grad=False)
    if whole.bias is not None:
        cut.bias = nn.Parameter(whole.bias.detach()[rows.to(whole.bias.device)], requires_grad=False)
    return cut


class _Chosen(nn.Module):
    """Some logits of a head that is more than its weight (an adapter, a quantised product): the literal twin."""

    def __init__(self, whole: nn.Module, rows: Int[Tensor, " labels"]) -> None:
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch labels"]:
        logits = self.whole(hidden)
        return logits[..., self.rows.to(logits.device)]


__getattr__ = forwarding(__name__)
