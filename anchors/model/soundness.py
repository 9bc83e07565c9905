"""What a loaded model must be, whatever it was loaded from: finite, and differentiable through every layer."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from anchors.errors import AnchorsError, brief

LINEAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a layer may be from its own adjoint, by the precision of its products."""


def quantised(model: nn.Module) -> bool:
    """Whether some weights only stand for numbers."""
    return getattr(model, "hf_quantizer", None) is not None or any(
        is_traceable_wrapper_subclass(weight) for weight in model.parameters()
    )


def cast(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Bring a model to a precision, the scales of its quantised weights, too: a checkpoint keeps them in its own.

    Raises:
        AnchorsError: its quantiser has fixed another one.
    """
    quantiser = getattr(model, "hf_quantizer", None)
    method = (
        "" if quantiser is None else str(getattr(quantiser.quantization_config, "quant_method", "")).lower()
    )
    if quantiser is None or method.endswith("torchao"):
        nn.Module.to(model, dtype)
    elif model.dtype != dtype:
        own = str(model.dtype).removeprefix("torch.")
        raise AnchorsError(
            f"{name!r} is quantised and computes in {own}, not in {str(dtype).removeprefix('torch.')}.",
            f"Use --precision {own}.",
            code="precision",
        )


def sound(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose numbers or gradients cannot be right.

    Raises:
        AnchorsError: several embeddings of tokens; a weight that is not finite; a quantised layer that cannot run here, or is not linear, or whose
            gradient is not its own.
    """
    refuse_several_embeddings(model, name)
    refuse_infinite(model, name)
    refuse_undifferentiable(model, name)


def refuse_several_embeddings(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose tokens are looked up in a list of tables.

    Raises:
        AnchorsError: says how many.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return
    if isinstance(embedding, nn.ModuleList):
        raise AnchorsError(
            f"{name!r} ({type(model).__name__}) embeds its tokens with a list of {len(embedding)} tables, one for each "
            "codebook of an audio codec: they are no tokens of a text.",
            "Use a model of text.",
            code="model-kind",
        )


def refuse_infinite(model: nn.Module, name: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        AnchorsError: names the tensor.
    """
    for key, weight in weights(model):
        if not finite(weight):
            flat = weight.detach().reshape(-1)
            where = int((~torch.isfinite(flat)).nonzero()[0])
            bad = int((~torch.isfinite(flat)).sum())
            at = torch.unravel_index(torch.tensor(where), weight.shape) if weight.dim() else ()
            place = ", ".join(str(int(i)) for i in at)
            raise AnchorsError(
                f"The weight {key} of {name!r} holds {bad} number{'s' * (bad > 1)} that "
                f"{'are' if bad > 1 else 'is'} not finite, the first at [{place}]: {float(flat[where])}.",
                "The file is damaged, its training diverged, or it needs more range than --precision float16 has.",
                code="not-finite",
            )


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, once each; those that a device map has put on disk are read from there, and those that only
    stand for numbers (quantised ones) are left out."""
    stored = _offloaded(model)
    for key, weight in model.named_parameters():
        if weight.is_meta and key in stored:
            weight = stored[key]
        if type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.is_meta:
            yield key, weight.detach()


def _offloaded(model: nn.Module) -> Mapping[str, Tensor]:
    """accelerate's map of the weights that lie elsewhere, by full name."""
    for module in model.modules():
        found = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        while found is not None and hasattr(found, "dataset"):
            found = found.dataset
        if found is not None:
            return found
    return {}


def finite(weight: Tensor) -> bool:
    """Whether all entries are finite, in one pass: the extremes of a tensor that holds a NaN are NaN."""
    if weight.numel() == 0:
        return True
    if weight.element_size() == 1:  # float8 knows no extremes
        return bool(torch.isfinite(weight.float()).all())
    return bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all())


def refuse_undifferentiable(model: PreTrainedModel, name: str) -> None:
    """Hold every kind of quantised layer against its own adjoint: for y(x) = W x + b and any u

        ⟨u, y(x) - y(0)⟩ = ⟨∂⟨u, y(x)⟩/∂x, x⟩

    which fails when the layer rounds its input (then its true gradient is zero almost everywhere and the one it gives is
    another function's), and when a kernel has no gradient.

    Raises:
        AnchorsError: names the layer.
    """
    seen = set()
    for key, layer in model.named_modules():
        width = getattr(layer, "in_features", None)
        weight = getattr(layer, "weight", None)
        if not isinstance(width, int) or not _quantised(layer, weight):
            continue
        kind = type(layer), type(weight), width, getattr(layer, "out_features", None)
        if kind in seen:
            continue
        seen.add(kind)
        shown = f"{type(weight).__name__ if type(layer) is nn.Linear else type(layer).__name__}, {key} of {name!r}"
        try:
            error, bound = _adjoint_error(layer, width, model)
        except Exception as problem:
            raise AnchorsError(
                f"A quantised layer ({shown}) does not run on {model.device}: {brief(problem)}",
                "Use the model before quantisation, or a weight-only quantisation that runs there.",
                code="quantised",
            ) from problem
        if not error <= bound:
            gone = (
                "its gradient is lost"
                if error == float("inf")
                else f"it and its gradient are {error:.1e} apart"
            )
            raise AnchorsError(
                f"A quantised layer ({shown}) is not differentiable as it runs: {gone}. It rounds its input, too, or its "
                "kernel has no backward pass.",
                "Use weight-only quantisation, or the model before quantisation.",
                code="quantised",
            )


def _quantised(layer: nn.Module, weight: Tensor | None) -> bool:
    if isinstance(weight, Tensor) and isinstance(layer, nn.Linear):
        return type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point()
    # Readers of GPTQ and AWQ checkpoints put layers of their own, which hold packed numbers.
    return hasattr(layer, "qweight")


def _adjoint_error(layer: nn.Module, width: int, model: PreTrainedModel) -> tuple[float, float]:
    """How far a layer is from its own adjoint, relative to ‖u‖ ‖y(x) - y(0)‖, and how far it may be."""
    draw = torch.Generator().manual_seed(0)
    dtype = model.dtype if model.dtype.is_floating_point else torch.float32
    x = torch.randn(32, width, generator=draw).to(model.device, dtype).requires_grad_(True)
    with torch.enable_grad():
        y = layer(x)
    if not y.requires_grad:
        return float("inf"), LINEAR[dtype]
    u = torch.randn(y.shape, generator=draw).to(y.device, y.dtype)
    (slope,) = torch.autograd.grad((u * y).sum(), x)
    with torch.no_grad():
        moved = (y - layer(torch.zeros_like(x))).double()
    outer, inner = (u.double() * moved).sum(-1), (slope.double() * x.detach().double()).sum(-1)
    size = (u.double().norm(dim=-1) * moved.norm(dim=-1)).clamp(min=1e-30)
    return float(((outer - inner).abs() / size).max()), LINEAR[dtype]
