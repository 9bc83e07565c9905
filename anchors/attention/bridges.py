"""Families that compute attention in a method of their own, led through the seam: a line of `BRIDGES` each.

A bridge takes the place of that method on each attention module: it makes queries, keys and values as the family does, with
the family's own projections and rotations, and leaves scores, mask, softmax and the sum over values to the seam. ALiBi is a
bias of each head on each key (`DenseCall.key_bias`): slope · position of the key, which differs from slope · distance by
what is the same for all keys of a row.
"""

import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchors.attention.form import boolean
from anchors.errors import RoutingError

Attend = Callable[..., tuple[Tensor, None]]
"""`anchors.attention.seam.attend`."""
Parts = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, [batch, heads, tokens, dim]."""
BESIDE = ("encoder_hidden_states", "key_value_states", "attn_prompt")
"""What makes a call another than self-attention over the tokens; the family's own method then runs."""


class Bridge(NamedTuple):
    """How a class of attention modules is led through the seam.

    Attributes:
        method: which of its methods is replaced.
        make: from `attend` to what takes its place.
        masked: whether the family wants a mask where there is nothing but the future to hide.
    """

    method: str
    make: Callable[[Attend], Callable[..., Any]]
    masked: bool = False


def _scores(scale: Callable[[Any], float], mask: Callable[..., Tensor | None] | None = None) -> Bridge:
    """A method `_attn(query, key, value, attention_mask)`, as GPT-J has it."""

    def make(attend: Attend) -> Callable[..., Any]:
        def through_seam(self, query, key, value, attention_mask=None):
            if mask is not None:
                attention_mask = mask(self, attention_mask, query.shape[-2], key.shape[-2])
            z, _ = attend(self, query, key.to(query.dtype), value, attention_mask, scaling=scale(self))
            return z.transpose(1, 2), None

        return through_seam

    return Bridge("_attn", make)


def _first_gpt(attend: Attend) -> Callable[..., Any]:
    """GPT's `_attn`: keys come transposed, and its own buffer hides the future."""

    def through_seam(self, q, k, v, attention_mask=None, output_attentions=False):
        if attention_mask is not None:
            attention_mask = boolean(attention_mask) & (self.bias[..., : q.shape[-2], : q.shape[-2]] > 0)
        scale = v.shape[-1] ** -0.5 if self.scale else 1.0
        return [attend(self, q, k.transpose(-1, -2), v, attention_mask, scaling=scale)[0].transpose(1, 2)]

    return through_seam


def _whole(
    parts: Callable[[Any, Tensor, dict[str, Any]], Parts],
    output: str | None,
    scale: Callable[[Any], float] | None = None,
    bias: Callable[[dict[str, Any], Tensor], Tensor] | None = None,
    masked: bool = False,
) -> Bridge:
    """A module's `forward`.

    Args:
        parts: the family's queries, keys and values of some hidden states.
        output: the name of the projection of what comes out, None where another module has it.
        scale: on the scores; without it 1 / √dim.
        bias: from the arguments and the keys to `DenseCall.key_bias`.
        masked: see `Bridge`.
    """

    def make(attend: Attend) -> Callable[..., Any]:
        def through_seam(self, hidden_states, residual=None, attention_mask=None, **given):
            if any(given.get(name) is not None for name in BESIDE):
                more = given | ({} if residual is None else {"residual": residual})
                return type(self).forward(self, hidden_states, attention_mask=attention_mask, **more)
            q, k, v = parts(self, hidden_states, given)
            past = given.get("past_key_values", given.get("layer_past"))
            if past is not None:
                k, v = getattr(past, "self_attention_cache", past).update(k, v, self.layer_idx)
            more = {"key_bias": bias(given, k)} if bias else {}
            z, _ = attend(self, q, k, v, attention_mask, scaling=scale(self) if scale else None, **more)
            z = z.flatten(2) if output is None else getattr(self, output)(z.flatten(2))
            return z if residual is None else z + residual, None

        return through_seam

    return Bridge("forward", make, masked)


def _heads(x: Tensor, dim: int) -> Float[Tensor, "batch heads tokens dim"]:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _bart(self, x: Tensor, given: dict[str, Any]) -> Parts:
    q, k, v = (_heads(f(x), self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
    return q, k, v


def _bert(self, x: Tensor, given: dict[str, Any]) -> Parts:
    q, k, v = (_heads(f(x), self.attention_head_size) for f in (self.query, self.key, self.value))
    return q, k, v


def _roformer(self, x: Tensor, given: dict[str, Any]) -> Parts:
    q, k, v = _bert(self, x, given)
    if given.get("sinusoidal_pos") is None:
        return q, k, v
    turned = (q, k, v) if self.rotary_value else (q, k)
    q, k, *rest = self.apply_rotary_position_embeddings(given["sinusoidal_pos"], *turned)
    return q, k, rest[0] if rest else v


def _bloom(self, x: Tensor, given: dict[str, Any]) -> Parts:
    return self._reshape(self.query_key_value(x))


def _mpt(self, x: Tensor, given: dict[str, Any]) -> Parts:
    mixed = self.Wqkv(x)
    if self.clip_qkv:
        mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
    q, k, v = (_heads(part, self.head_dim) for part in mixed.chunk(3, -1))
    return q, k, v


def _falcon(self, x: Tensor, given: dict[str, Any]) -> Parts:
    q, k, v = (part.transpose(1, 2) for part in self._split_heads(self.query_key_value(x)))
    rotate = sys.modules[type(self).__module__].apply_rotary_pos_emb
    return *rotate(q, k, *given["position_embeddings"]), v


def _local(self, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """GPT-Neo's mask: the future is hidden in every layer, what lies beyond a window in those that say so."""
    if self.attention_type != "local":
        return mask
    band = self.bias[:, :, keys - queries : keys, :keys]
    return band if mask is None else band & boolean(mask)


def _bloom_bias(given: dict[str, Any], k: Tensor) -> Float[Tensor, "batch heads keys"]:
    return given["alibi"].view(len(k), -1, k.shape[2])


def _mpt_bias(given: dict[str, Any], k: Tensor) -> Float[Tensor, "1 heads keys"]:
    return given["position_bias"][None, :, 0, -k.shape[2] :]


BRIDGES = {
    "gptj.GPTJAttention": _scores(lambda own: 1 / float(own.scale_attn)),
    "codegen.CodeGenAttention": _scores(lambda own: 1 / float(own.scale_attn)),
    "gpt_neo.GPTNeoSelfAttention": _scores(lambda own: 1.0, _local),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": _scores(lambda own: 1 / own.norm_factor),
    "openai.Attention": Bridge("_attn", _first_gpt),
    "bloom.BloomAttention": _whole(_bloom, "dense", bias=_bloom_bias),
    "mpt.MptAttention": _whole(_mpt, "out_proj", lambda own: own.softmax_scale, _mpt_bias, masked=True),
    "falcon.FalconAttention": _whole(_falcon, "dense"),
    "xglm.XGLMAttention": _whole(_bart, "out_proj"),
    "trocr.TrOCRAttention": _whole(_bart, "out_proj"),
    "mvp.MvpAttention": _whole(_bart, "out_proj"),
    "rembert.RemBertSelfAttention": _whole(_bert, None),
    "megatron_bert.MegatronBertSelfAttention": _whole(_bert, None),
    "big_bird.BigBirdSelfAttention": _whole(_bert, None),
    "roformer.RoFormerSelfAttention": _whole(_roformer, None),
}
"""By class of attention module, below `transformers.models`."""


def _bridged(model: nn.Module) -> Iterator[tuple[nn.Module, Bridge, str]]:
    """The attention modules that have a bridge, and the attribute that it takes the place of."""
    for module in model.modules():
        path = type(module).__module__.split(".")
        if path[:2] == ["transformers", "models"] and len(path) > 2:
            bridge = BRIDGES.get(f"{path[2]}.{type(module).__qualname__}")
            if bridge is not None:
                # accelerate keeps what computes behind a `forward` that first fetches the weights.
                hooked = bridge.method == "forward" and "_old_forward" in vars(module)
                yield module, bridge, "_old_forward" if hooked else bridge.method


def bridge(model: PreTrainedModel, attend: Attend, name: str, masked: str | None = None) -> bool:
    """Lead the attention of a family of `BRIDGES` through the seam; False for any other.

    Args:
        model: on its own attention.
        attend: the seam's.
        name: under which masks are made, and under which where the family wants one always (`masked`).

    Raises:
        RoutingError: Falcon with ALiBi, of which transformers has two models.
    """
    found = list(_bridged(model))
    if found and getattr(model.config, "alibi", None) is True:
        raise RoutingError(
            f"{type(model).__name__} with ALiBi is two models in transformers: its eager attention adds the bias twice, its sdpa "
            "attention once, and their logits differ. There is no witness to hold numbers to.",
            "Use a Falcon with rotary embedding (alibi=False: falcon-7b, falcon-40b, Falcon 2), or BLOOM or MPT for ALiBi.",
        )
    for module, one, attribute in found:
        setattr(module, attribute, MethodType(one.make(attend), module))
    if found:
        always = any(one.masked for _, one, _ in found)
        model.config._attn_implementation_internal = masked if always and masked else name
    return bool(found)


def release(model: PreTrainedModel) -> bool:
    """Undo `bridge`; False when the model has no attention with a bridge."""
    found = list(_bridged(model))
    for module, one, attribute in found:
        if attribute == one.method:
            delattr(module, attribute)
        else:
            setattr(module, attribute, MethodType(getattr(type(module), one.method), module))
    if found:
        model.config._attn_implementation_internal = "eager"
    return bool(found)
