"""Quantised models: weight-only ones are the model of their dequantised weights, gradients included; others are refused."""

from pathlib import Path

import pytest
import torch
from families import make
from transformers import AutoModelForCausalLM, TorchAoConfig

from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model.language import load
from anchors.model.soundness import finite
from anchors.reweighting import label_head

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerGroup

SCHEMES = {
    "int8": lambda: Int8WeightOnlyConfig(),
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make("llama", len(tokenizer)).save_pretrained(folder)
    return folder


def quantised(whole: Path, scheme: object, dtype: torch.dtype, head: bool = False):
    config = TorchAoConfig(scheme, include_input_output_embeddings=head)
    return AutoModelForCausalLM.from_pretrained(whole, quantization_config=config, dtype=dtype)


def numbers(weight: torch.Tensor) -> torch.Tensor:
    """What a quantised weight stands for: (whole number - zero point) × scale, by blocks of its rows."""
    if type(weight) is torch.Tensor:
        return weight.float()
    whole, scale = weight.qdata.float(), weight.scale.float()
    zero = getattr(weight, "zero_point", None)
    blocks = scale.shape[-1] if scale.dim() == 2 else 1
    scale = scale.reshape(len(whole), blocks).repeat_interleave(whole.shape[1] // blocks, 1)
    if zero is not None:
        whole = whole - zero.float().reshape(len(whole), blocks).repeat_interleave(
            whole.shape[1] // blocks, 1
        )
    return whole * scale


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_weight_only_models_are_their_dequantised_twins(
    tmp_path, whole, tokenizer, prompts, scheme, stored, head
):
    """Saved and loaded again, in float32 whatever precision its scales were stored in, against transformers' own eager
    attention over weights that are multiplied out by hand."""
    model = quantised(whole, SCHEMES[scheme](), stored, head)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    twin = make("llama", len(tokenizer))
    twin.load_state_dict({name: numbers(weight.detach()) for name, weight in model.state_dict().items()})
    before = make("llama", len(tokenizer)).model.layers[0].mlp.up_proj.weight
    assert not torch.allclose(twin.model.layers[0].mlp.up_proj.weight, before, atol=1e-3), (
        "nothing was quantised"
    )
    prompt = prompts[0]
    out = twin(torch.tensor([prompt.ids]), output_attentions=True)
    own = out.logits[0, -1][list(prompt.label_ids)]
    loss = torch.nn.functional.cross_entropy(own[None], torch.tensor([prompt.gold]))
    slopes = torch.autograd.grad(loss, out.attentions)
    maps = torch.stack(
        [(a * g).sum(1)[0].abs() for a, g in zip(out.attentions, slopes, strict=True)]
    ).detach()
    lm = load(str(tmp_path), device="cpu")
    found = flow(lm, [prompt], maps=range(3))
    torch.testing.assert_close(found.probabilities[0], own.softmax(-1).detach(), atol=1e-4, rtol=1e-3)
    got = torch.stack([found.maps[layer][0] for layer in range(3)])
    lower = torch.ones(maps.shape[-2:]).tril(-1).bool()
    torch.testing.assert_close(got[:, lower], maps[:, lower], atol=1e-3 * float(maps.max()), rtol=1e-3)
    ids, target = torch.tensor([prompt.ids]), torch.tensor([prompt.target])
    with torch.no_grad():
        logits = lm.logits_at(ids, target)[:, list(prompt.label_ids)]
        with label_head(lm, prompt.label_ids):
            torch.testing.assert_close(lm.logits_at(ids, target), logits)


def test_a_layer_that_rounds_its_input_has_no_gradient_and_is_refused(whole, tokenizer):
    """torchao runs it without a word, and every gradient that should pass through it is gone."""
    model = quantised(whole, Int8DynamicActivationInt8WeightConfig(), torch.float32)
    x = torch.randn(4, 32, requires_grad=True)
    assert not model.model.layers[0].self_attn.q_proj(x).requires_grad
    with pytest.raises(
        AnchorsError, match=r"Int8Tensor, model\.layers\.0\.self_attn\.q_proj.*gradient is lost"
    ):
        load(model, tokenizer=tokenizer, device="cpu")


def test_a_layer_whose_kernel_is_not_here_is_refused(tokenizer):
    """torchao's plain int4 weights, which only its CUDA kernels multiply."""
    from torchao.quantization import Int4Tensor

    model = make("llama", len(tokenizer))
    packed = Int4Tensor(
        torch.zeros(32, 16, dtype=torch.int8),
        torch.ones(2, 32),
        torch.zeros(2, 32),
        [1, 16],
        torch.Size([32, 32]),
    )
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        AnchorsError, match=r"Int4Tensor, model\.layers\.1\.self_attn\.q_proj.* does not run on cpu"
    ):
        load(model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_finite_is_what_torch_says(dtype):
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(7, 5, generator=draw).to(dtype)
    top = torch.full((400,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(plain)
    assert finite(top), "a large number is a number"
    assert finite(torch.empty(0, dtype=dtype))
    for bad in (
        (float("nan"), float("inf"), float("-inf")) if dtype is not torch.float8_e4m3fn else (float("nan"),)
    ):
        spoiled = plain.clone()
        spoiled.view(-1)[17] = bad
        assert not finite(spoiled)
