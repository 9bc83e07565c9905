"""What `prepare` alters in a loaded model beside putting it on the seam: one list, to be taken back at any time.

An alteration is one attribute of one module: what stood there, and what stands there now. None of them changes the function
that the model computes, in exact arithmetic; whoever doubts it can ask the model as it was loaded:

    with undone(model.altered):
        logits = model.model(ids).logits
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN, NewGELUActivation

from anchors.attention.streaming import triton_runs
from anchors.errors import AnchorsError
from anchors.model.alteration import ABSENT, Alteration

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel


def alterations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str, precision: str
) -> Iterator[Alteration]:
    """What to alter in a model, in the order in which it is done.

    Raises:
        AnchorsError: the tokenizer has ordinary tokens that the embedding has no row for.
    """
    yield from fewer_hooks(model)
    yield from fused_gelu(model)
    if precision != "float64" and triton_runs(model.device):
        from anchors.model.norms import one_kernel_norms  # Triton is imported where it runs only
        from anchors.model.products import split_products

        yield from one_kernel_norms(model)
        if precision == "float32":
            yield from split_products(model)
    half = model.dtype in (torch.bfloat16, torch.float16)
    if (embedding := _part(model, "get_input_embeddings")) is not None:
        if tokenizer is not None and beyond(tokenizer, embedding, name):
            yield guarded(embedding, name)
        if half:
            yield Alteration.of(
                embedding,
                (attribute := computing(embedding)),
                partial(_widened, getattr(embedding, attribute)),
            )
    if half and (head := _part(model, "get_output_embeddings")) is not None:
        yield from wide_products(head)


def round_norms(model: "LanguageModel") -> None:
    """Let norms write in half precision what one product alone reads, which would round it."""
    if model.model.dtype not in (torch.bfloat16, torch.float16) or not triton_runs(model.device):
        return
    from anchors.model.norms import OneKernel, let_round

    norms = [a.after for a in model.altered if isinstance(a.after, OneKernel)]
    let_round(norms, lambda: model.logits(model.witness.ids), model.model.dtype)


def apply(wanted: Iterable[Alteration]) -> tuple[Alteration, ...]:
    """Do some alterations; returns them. Each is made only after those before it have been done."""
    done = []
    for alteration in wanted:
        alteration.do()
        done.append(alteration)
    return tuple(done)


@contextmanager
def undone(done: Sequence[Alteration]) -> Generator[None]:
    """Take alterations back for a while."""
    for alteration in reversed(done):
        alteration.undo()
    try:
        yield
    finally:
        for alteration in done:
            alteration.do()


def _part(model: PreTrainedModel, getter: str) -> nn.Module | None:
    """The embedding or the head of a model, None where its family says that it has none."""
    try:
        return getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None


def computing(module: nn.Module) -> str:
    """The attribute that computes: accelerate keeps it behind a `forward` that first fetches the weights."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def fewer_hooks(model: nn.Module) -> list[Alteration]:
    """In a block that lies whole on one device, accelerate's hooks on its parts taken away.

    `dispatch_model` gives every submodule a hook that moves what it takes to its device. The block's own has moved it
    already; those inside cost a CPU a third of a pass, and hide from `split_products` and the norms what they replace. Where
    weights are fetched for each use, nothing is taken away.
    """
    found = []
    for name in getattr(model, "hf_device_map", {}):
        block, whole = model.get_submodule(name), name.rpartition(".")[0]
        hooked = [part for part in block.modules() if "_hf_hook" in vars(part)]
        places = {_moves_to(part) for part in hooked}
        if (
            isinstance(model.get_submodule(whole), nn.ModuleList)
            and block in hooked
            and len(places) == 1
            and None not in places
        ):
            for part in hooked[1:]:
                plain = getattr(part._old_forward, "__func__", None) is type(part).forward
                found += [
                    Alteration.of(part, "forward", ABSENT if plain else part._old_forward),
                    Alteration.of(part, "_old_forward", ABSENT),
                    Alteration.of(part, "_hf_hook", ABSENT),
                ]
    return found


def _moves_to(module: nn.Module) -> Any:
    """The device that accelerate's hook moves to what a module takes; None for a hook that does more than that."""
    from accelerate.hooks import AlignDevicesHook

    hook = module._hf_hook
    moves = type(hook) is AlignDevicesHook and not hook.offload and not hook.io_same_device
    return hook.execution_device if moves and "_old_forward" in vars(module) else None


def fused_gelu(model: nn.Module) -> list[Alteration]:
    """transformers' step-by-step `gelu_new` as torch's one-kernel form of the same function.

    Both are ½x(1 + tanh(√(2/π)(x + 0.044715x³))); the fused one moves an eighth of the memory.
    """
    return [
        Alteration.of(parent, child, ACT2FN["gelu_pytorch_tanh"])
        for parent in model.modules()
        for child, module in parent.named_children()
        if isinstance(module, NewGELUActivation)
    ]


def beyond(tokenizer: PreTrainedTokenizerBase, embedding: nn.Module, name: str) -> bool:
    """Whether the tokenizer has tokens that the embedding has no row for.

    Special tokens may lie there and never occur in a text (Gemma 3's `<image_soft_token>` in its text-only sizes);
    tokens that any text may hold may not.

    Raises:
        AnchorsError: an ordinary token lies there.
    """
    rows = rows_of(embedding)
    if rows is None or not (over := {i for i in tokenizer.get_vocab().values() if i >= rows}):
        return False
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ordinary := sorted(over - special):
        token = tokenizer.convert_ids_to_tokens(ordinary[0])
        raise AnchorsError(
            f"The tokenizer does not belong to the model {name!r}: the embedding has {rows} rows, the tokenizer "
            f"{len(tokenizer)} tokens, and {len(ordinary)} of them ({token!r} is token {ordinary[0]}) have none.",
            "Give the tokenizer that the model was trained with (or resize_token_embeddings, and train it).",
            code="tokenizer",
        )
    return True


def rows_of(embedding: nn.Module) -> int | None:
    """How many tokens an embedding knows, also inside an adapter's wrapper; None when it does not say."""
    tables = (getattr(module, "num_embeddings", None) for module in embedding.modules())
    return next((rows for rows in tables if isinstance(rows, int)), None)


def guarded(embedding: nn.Module, name: str) -> Alteration:
    """The embedding, refusing a token that it has no row for, which its kernel would answer with an IndexError or, on
    CUDA, by ending the process."""
    attribute = computing(embedding)
    return Alteration.of(
        embedding, attribute, partial(_guarded, getattr(embedding, attribute), embedding, name)
    )


def _guarded(
    own: Callable[..., Tensor],
    embedding: nn.Module,
    name: str,
    ids: Int[Tensor, "*batch tokens"],
    **options: Any,
) -> Tensor:
    rows = rows_of(embedding)
    if rows is not None and ids.numel() and (last := int(ids.max())) >= rows:
        raise AnchorsError(
            f"The prompt holds token {last}, but the embedding of {name!r} has {rows} rows: its tokenizer is larger than "
            "its vocabulary.",
            "Leave the added special tokens out of texts and template, or give the model's own tokenizer.",
            code="tokenizer",
        )
    return own(ids, **options)


def _widened(own: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Start the residual stream in float32 where `LanguageModel.arithmetic` keeps it so."""
    embedded = own(*args, **options)
    return embedded.float() if torch.is_autocast_enabled(embedded.device.type) else embedded


def wide_products(head: nn.Module) -> list[Alteration]:
    """A half-precision head whose products are formed in float32: logits rounded to 8 bits would put that error into
    every gradient at once. What stands around its plain linear layers (an adapter's sum, a scale) is left as it is and
    called; quantised weights are, too."""
    return [
        Alteration.of(module, computing(module), partial(_wide_forward, module))
        for module in head.modules()
        if is_plain_linear(module)
    ]


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is nothing but a product with a weight that is held as numbers: no subclass, which quantisers
    and parametrisations use; no tensor that only stands for numbers, as torchao's do."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _wide_forward(module: nn.Linear, x: Float[Tensor, "*batch inner"]) -> Float[Tensor, "*batch outer"]:
    bias = None if module.bias is None else module.bias.float()
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), module.weight.float(), bias)
