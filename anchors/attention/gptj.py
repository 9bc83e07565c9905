"""GPT-J computes attention in its own method; this leads that method through the seam."""

from collections.abc import Callable
from types import MethodType

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention


def bridge(model: PreTrainedModel, attend: Callable[..., tuple[Tensor, None]], name: str) -> bool:
    """Replace `_attn` of every GPT-J attention module by the seam; False when the model has none."""

    def through_seam(self, query, key, value, attention_mask=None):
        scale = 1.0 / float(self.scale_attn)
        z, _ = attend(self, query, key.to(query.dtype), value, attention_mask, scaling=scale)
        return z.transpose(1, 2), None

    modules = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    for module in modules:
        module._attn = MethodType(through_seam, module)
    if modules:
        model.config._attn_implementation_internal = name
    return bool(modules)


def release(model: PreTrainedModel) -> bool:
    """Undo `bridge`; False when the model has no GPT-J attention."""
    modules = [module for module in model.modules() if isinstance(module, GPTJAttention)]
    for module in modules:
        del module._attn
    if modules:
        model.config._attn_implementation_internal = "eager"
    return bool(modules)
