"""Norms in one kernel against the modules whose place they take, forward and backward."""

import pytest
import torch
from gpu import needs_interpreter, needs_triton
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class TwiceNorm(LlamaRMSNorm):
    """A formula that nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, LlamaRMSNorm, GemmaRMSNorm])
def test_one_kernel_is_the_module(kind):
    from anchors.model.norms import norm, one_kernel_norms

    torch.manual_seed(0)
    module = kind(24).requires_grad_(False)
    for weight in module.parameters():
        weight.normal_()
    x, dy = (2 + torch.randn(2, 5, 24)).requires_grad_(), torch.randn(2, 5, 24)
    (made,) = one_kernel_norms(torch.nn.Sequential(module))
    own = module(x)
    found = norm(x, module.weight, getattr(module, "bias", None), made.after.form, torch.float32)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(y, x, dy)[0] for y in (found, own)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)
    half = norm(x, module.weight, getattr(module, "bias", None), made.after.form, torch.float16)
    assert torch.equal(half, found.half())


@needs_triton
@needs_interpreter
def test_another_formula_is_left_alone():
    from anchors.model.norms import one_kernel_norms

    torch.manual_seed(0)
    known, unknown = LlamaRMSNorm(24), TwiceNorm(24)
    model = torch.nn.Sequential(known, unknown, torch.nn.GroupNorm(2, 24)).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_()
    assert [alteration.owner for alteration in one_kernel_norms(model)] == [known]
