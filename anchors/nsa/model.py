"""`NativeSparseAttention` as a module, and a causal language model around it.

The model is transformers' Llama with another attention, so that saving, loading, generating with a cache, and every
analysis of this toolkit work as on any other. Keys and values of the three branches are independent (section 3.3.3,
"to prevent shortcut learning") and share one query. In a cache they lie side by side as 3 · groups heads, and what is
compressed from them beside (`anchors.nsa.cache`).

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
    rotate_half,
)

from anchors.attention import seam
from anchors.errors import AnchorsError
from anchors.nsa import phi
from anchors.nsa.attention import Branches, nsa_attention
from anchors.nsa.cache import NSALayer, Pair, remembering
from anchors.nsa.call import NSACall, Sparse
from anchors.nsa.config import NSAConfig
from anchors.nsa.reference import compress
from anchors.nsa.texts import Layout, Texts, refuse_holes

NATIVE = "nsa"
"""The attention implementation of an NSA model that is not on the seam."""


def native(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
    """The attention function of `NATIVE`: heads first in, tokens first out, as transformers calls it."""
    sparse: Sparse = kwargs["sparse"]
    o = nsa_attention(
        query.transpose(1, 2), sparse.kv, sparse.gates, sparse.geometry,
        scale=kwargs["scaling"], q_cmp=sparse.q_cmp, past=sparse.past, texts=sparse.texts, backend=sparse.backend,
    )  # fmt: skip
    return o, None


def no_mask(*args: object, attention_mask: Tensor | None = None, **kwargs: object) -> None:
    """NSA is causal by itself and has no use for a mask. Padding is known by its texts (`NSAModel`), or refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        _refuse_padding()


def _refuse_padding() -> None:
    raise AnchorsError(
        "NSA was given a mask that hides tokens: here its blocks would be filled with padding.",
        "Pass a mask [batch, tokens], with a column for each token of a cache that grows (transformers' default), and "
        "without an analysis; or pad on the right and pass no mask (nothing sees what follows it); or use a batch of one.",
        code="shape",
    )


AttentionInterface.register(NATIVE, native)
AttentionMaskInterface.register(NATIVE, no_mask)


class NativeSparseAttention(nn.Module):
    """NSA with its projections: x ↦ W_o Σ_c g^c ⊙ Attn(q, K^c, V^c).

    One query and three pairs of keys and values are projected from x; the gates are σ(W_g x + b), one per branch and
    head. It stands alone (`layer(x)`), or in the place of a Llama's attention.

    Args:
        config: sizes, geometry and φ.
        layer_idx: which entry of a cache is this layer's.
    """

    def __init__(self, config: NSAConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.geometry, self.heads = config.geometry, config.num_attention_heads
        self.groups, self.head_dim, dim_v = config.widths
        self.scaling, self.is_causal = self.head_dim**-0.5, True
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, 3 * self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, 3 * self.groups * dim_v, bias=bias)
        self.gate_proj = nn.Linear(size, 3 * self.heads)
        self.o_proj = nn.Linear(self.heads * dim_v, size, bias=bias)
        self.phi_k = phi.make(config.phi, self.geometry.l, self.head_dim)
        self.phi_v = phi.make(config.phi, self.geometry.l, dim_v)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        vars(self.gate_proj)["begin"] = config.gate_bias
        nn.init.constant_(self.gate_proj.bias, config.gate_bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        cu_seqlens: Int[Tensor, " sequences_and_one"] | None = None,
        texts: Texts | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], None]:
        """The layer's output; in a cache it continues the tokens there.

        Args:
            past_key_values, cache: the cache, under its name before and since transformers 5.24.
            position_ids: where the tokens stand; in their texts, or after those of the cache, unless given.
            attention_mask: [batch, tokens], 0 where there is padding; with a cache on the left only, and with a column
                for each token there too. A causal mask says nothing new.
            cu_seqlens: bounds of sequences packed into one row, which do not see each other; no cache then.
            texts: the same, or the padding of several rows, made once for all layers.
        """
        cache = past_key_values if cache is None else cache
        unheard = [name for name, given in kwargs.items() if isinstance(given, Cache)]
        if unheard:
            raise AnchorsError(
                f"This transformers hands a layer its cache as {unheard[0]!r}, a name that NSA does not know: it would be "
                "ignored.",
                "Use a version of transformers that label-anchors declares.",
                code="package",
            )
        if not hidden_states.numel():
            raise AnchorsError(
                f"There is nothing to attend to: the input has the shape {tuple(hidden_states.shape)}.",
                "Give at least one sequence of one token.",
                code="shape",
            )
        if cu_seqlens is not None:
            if len(hidden_states) != 1 or cache is not None or position_ids is not None:
                raise AnchorsError(
                    "Packed sequences come as one row, without a cache and without positions: each starts at 0.",
                    "Reshape to [1, tokens, …].",
                    code="shape",
                )
            texts = Texts.of_bounds(cu_seqlens, hidden_states.shape[1])
        batch, tokens, _ = hidden_states.shape
        home = hidden_states.device
        cached = None if cache is None else _cached_positions(cache, self.layer_idx, home)
        past = 0 if cached is None else cached.shape[-1]
        if attention_mask is not None and attention_mask.dim() == 2:
            if cache is None:
                texts = Texts.of_mask(attention_mask, position_ids)
            else:
                texts = _padded_left(attention_mask, past + tokens)
            attention_mask = None
        kept = None if cache is None else remembering(cache, self.layer_idx)
        alike = _continued(cache, self.layer_idx, texts, past) if cache is not None and past else None
        if position_ids is None and texts is not None:
            position_ids = texts.position[:, past:]
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=home)[None]
        if attention_mask is not None:
            _demand_causal(attention_mask, tokens, past)
        q = self.q_proj(hidden_states).view(batch, tokens, self.heads, -1)
        keys = self.k_proj(hidden_states).view(batch, tokens, 3, self.groups, -1)
        values = self.v_proj(hidden_states).view(batch, tokens, 3, self.groups, -1)
        gates = self.gate_proj(hidden_states).view(batch, tokens, self.heads, 3).sigmoid()
        if alike is not None:
            gates = gates.masked_fill(~alike.to(home)[:, None, None, None], torch.nan)

        rope = self.config.compressed_rope
        cos, sin = self.rotary_emb(hidden_states, position_ids)
        raw, q_cmp = keys[:, :, 0], q if rope == "none" else None
        q = _rotate(q, cos, sin)
        if rope == "inner":
            raw = _rotate(raw, cos, sin)
        keys = torch.stack([raw, *(_rotate(keys[:, :, c], cos, sin) for c in (1, 2))], dim=2)
        positions = position_ids
        if cache is not None and cached is not None:
            keys, values = cache.update(
                keys.flatten(2, 3).transpose(1, 2), values.flatten(2, 3).transpose(1, 2), self.layer_idx
            )
            keys, values = (x.transpose(1, 2).unflatten(2, (3, self.groups)) for x in (keys, values))
            if keys.shape[1] != past + tokens:
                raise AnchorsError(
                    f"{type(cache).__name__} returns {keys.shape[1]} keys for {past + tokens} tokens.",
                    "NSA needs a cache that grows: DynamicCache, transformers' default.",
                    code="shape",
                )
            rows = max(len(cached), len(position_ids))
            positions = torch.cat([cached.expand(rows, -1), position_ids.expand(rows, -1)], dim=-1)
            vars(cache.layers[self.layer_idx]).update(positions=positions, texts=texts)
        # Any other implementation would compute dense attention of one branch, and say nothing.
        name = seam.NAME if self.config._attn_implementation == seam.NAME else NATIVE
        if texts is not None:
            texts = texts.expanded(batch, home)
            if name == seam.NAME:
                raise AnchorsError(
                    "An analysis of NSA was given several texts in a row, or padding.",
                    "Give one text a row, without padding.",
                    code="shape",
                )
        layout = None if texts is None else texts.laid(self.geometry)
        sparse = Sparse(
            kv=self._branches(keys, values, positions, hidden_states, layout, kept),
            v_cmp=values[:, :, 0], phi_v=self.phi_v, gates=gates, q_cmp=q_cmp,
            geometry=self.geometry, past=past, backend=self.config.backend, texts=texts,
        )  # fmt: skip
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, native)
        o, _ = interface(
            self, q.transpose(1, 2), sparse.kv.k_slc.transpose(1, 2), sparse.kv.v_slc.transpose(1, 2), None,
            scaling=self.scaling, form=partial(NSACall, sparse=sparse), sparse=sparse,
        )  # fmt: skip
        return self.o_proj(o.reshape(batch, tokens, -1)), None

    def _branches(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        like: Tensor,
        layout: Layout | None,
        kept: NSALayer | None,
    ) -> Branches:
        def make(first: int) -> Pair:
            if layout is not None:
                return self._compressed(keys[:, :, 0], values[:, :, 0], positions, like, layout, first)
            start = first * self.geometry.d
            return self._compressed(keys[:, start:, 0], values[:, start:, 0], positions[:, start:], like)

        if kept is None:
            kc, vc = make(0)
        else:
            maker = id(self), self.config.compressed_rope, layout is not None
            unused = 0 if layout is None else self.geometry.l // self.geometry.d
            kc, vc = kept.compressed(self.geometry, maker, make, unused)
        return Branches(kc, vc, keys[:, :, 1], values[:, :, 1], keys[:, :, 2], values[:, :, 2])

    def _compressed(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        like: Tensor,
        layout: Layout | None = None,
        first: int = 0,
    ) -> Pair:
        """φ of every complete block of some raw keys and values (Eq. 7): the first begins at the first of them, or is the
        row `first` of a layout."""
        l, d = self.geometry.l, self.geometry.d
        raw = (keys, self.phi_k), (values, self.phi_v)
        if layout is None:
            kc, vc = (compress(x, pool, l=l, d=d) for x, pool in raw)
        else:
            kc, vc = (layout.compress(x, pool, first) for x, pool in raw)
        rope = self.config.compressed_rope
        if rope in ("block_centre", "block_start") and kc.shape[1]:
            if layout is None:
                block = positions.float().unfold(-1, l, d)
            else:
                block = layout.of_blocks(positions.float().expand(len(keys), -1), first)
            cos, sin = self.rotary_emb(like, block.mean(-1) if rope == "block_centre" else block[..., 0])
            kc = _rotate(kc, cos, sin)
        return kc.to(keys.dtype), vc.to(values.dtype)


def _rotate(x: Float[Tensor, "batch tokens heads dim"], cos: Tensor, sin: Tensor) -> Tensor:
    # Where the residual stream is wider than the products (autocast), the angles are too.
    return (x * cos[:, :, None] + rotate_half(x) * sin[:, :, None]).to(x.dtype)


def _cached_positions(cache: Cache, layer: int, device: torch.device) -> Int[Tensor, "#batch past"]:
    """Where the tokens of a cache stand: 0, 1, … unless some were left out."""
    past = cache.get_seq_length(layer)
    found = getattr(cache.layers[layer], "positions", None) if layer < len(cache.layers) else None
    return torch.arange(past, device=device)[None] if found is None else found[:, :past].to(device)


def _padded_left(mask: Tensor, tokens: int) -> Texts | None:
    """The texts of a batch that a cache is to hold; None where nothing is padded. Looks at the mask, once, on any device:
    `generate` waits for each token anyway.

    Args:
        mask: [batch, tokens], with those of the cache.

    Raises:
        AnchorsError: padding elsewhere than on the left.
    """
    real = mask.bool()
    ended = (real[:, :-1] & ~real[:, 1:]).any()
    whole, wrong = torch.stack([real.all(), ended]).tolist()
    if whole:
        return None
    texts = Texts.of_mask(mask)
    if wrong and not bool(texts.sound.all()):
        refuse_holes()
    if wrong:
        raise AnchorsError(
            "A batch that a cache is to hold is padded on the right: the next token would follow padding, not its text.",
            "Pad on the left (padding_side='left' of the tokenizer); or give no cache, where nothing is to follow.",
            code="shape",
        )
    if texts.tokens != tokens:
        raise AnchorsError(
            f"A mask of {texts.tokens} tokens came with {tokens}, those of the cache included.",
            "Give a column for each token of the cache and each new one, as `generate` does.",
            code="shape",
        )
    return texts


def _demand_unpacked(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Texts are not packed into a row that goes into a cache. Looks at the positions of several tokens, as at the mask."""
    if position_ids is None or position_ids.dim() != 2:
        return
    falls = position_ids.diff(dim=1) <= 0
    if mask is not None:  # positions of padding say nothing
        falls = falls & mask[:, mask.shape[1] - position_ids.shape[1] : -1].bool()
    if falls.numel() and bool(falls.any()):
        raise AnchorsError(
            "Positions that begin anew came with a cache: texts that are packed into one row would see each other there.",
            "Give one text a row; or no cache, where nothing is to follow.",
            code="shape",
        )


def _continued(cache: Cache, layer: int, texts: Texts | None, past: int) -> Bool[Tensor, "#batch"] | None:
    """Whether the texts of a cache go on as they were; None where there is no padding, now or before.

    Raises:
        AnchorsError: where they do not. On a GPU looking would wait for it: there the outputs of such a row are not numbers.
    """
    held: Texts | None = vars(cache.layers[layer]).get("texts")
    known = held if texts is None else texts
    if known is None:
        return None
    like = known.start
    before, now = (
        like.new_zeros(1, past) if x is None else x.start[:, :past].to(like.device) for x in (held, texts)
    )
    fits = before.shape[1] == now.shape[1] and (len(before) == len(now) or 1 in (len(before), len(now)))
    alike = (before == now).all(1) if fits else torch.zeros(1, dtype=torch.bool)
    # Whoever forgets the mask does so once: the next step finds nothing held.
    if (texts is None or not alike.is_cuda) and not bool(alike.all()):
        raise AnchorsError(
            "A cache that holds padding, or several texts in a row, was to be continued otherwise than it was filled.",
            "Give the mask of all tokens, those of the cache too, with the same padding on the left; texts that were packed "
            "into one row cannot be continued.",
            code="shape",
        )
    return alike


def _demand_causal(mask: Tensor, queries: int, past: int) -> None:
    """NSA needs no mask, but transformers may pass the causal one."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    rows = torch.arange(queries, device=mask.device)[:, None] + past
    causal = torch.arange(seen.shape[-1], device=mask.device) <= rows
    if not torch.equal(seen, causal.expand_as(seen)):
        _refuse_padding()


class NSAPreTrainedModel(LlamaPreTrainedModel):
    config: NSAConfig  # ty: ignore[incompatible-mutable-override] - as every family of transformers narrows it
    config_class = NSAConfig
    _supports_flash_attn = _supports_flex_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, phi.LinearPool | phi.MLP):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and "begin" in vars(module):
            module.bias.fill_(vars(module)["begin"])


class NSAModel(NSAPreTrainedModel, LlamaModel):
    """A Llama whose layers attend natively sparse.

    Texts may be packed into a row, by `cu_seqlens` or by positions that do not rise where a text begins, and rows may be
    padded at either end, by an attention mask; without an analysis. No text sees another. What a cache is to hold is
    padded on the left only, as `generate` wants it.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        if config.attention == "nsa":
            for index, layer in enumerate(self.layers):
                layer.self_attn = NativeSparseAttention(config, index)
            self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens hidden"] | None = None,
        cu_seqlens: Int[Tensor, " sequences_and_one"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel's. `cu_seqlens` are the bounds of texts packed into one row."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        # Its name since transformers 5.24 is another.
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cu_seqlens is not None and (
            cache is not None
            or attention_mask is not None
            or given is None
            or len(given) != 1
            or self.config.attention != "nsa"
        ):
            raise AnchorsError(
                "Packed sequences come as one row, without a cache or a mask, to a model with native sparse attention.",
                "Reshape to [1, tokens].",
                code="shape",
            )
        texts, past = None, 0 if cache is None else cache.get_seq_length()
        if cu_seqlens is not None and given is not None:
            texts = Texts.of_bounds(cu_seqlens, given.shape[1])
        elif given is not None and self.config._attn_implementation == NATIVE:
            if cache is None:
                texts = _texts(attention_mask, position_ids, given.shape[1])
            else:
                mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
                if mask is not None:
                    texts, attention_mask = _padded_left(mask, past + given.shape[1]), None
                _demand_unpacked(position_ids, None if texts is None else mask)
        if texts is not None:
            attention_mask, kwargs = None, kwargs | {"texts": texts}
            position_ids = texts.position[:, past:] if position_ids is None else position_ids
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip


def _texts(mask: Tensor | None, position_ids: Tensor | None, tokens: int) -> Texts | None:
    """The texts that a mask and positions tell of. On the CPU it is seen where there is one a row; on a GPU looking would
    wait for it."""
    if mask is not None and tuple(mask.shape[1:]) != (tokens,):
        return None
    if mask is not None and not mask.is_cuda and bool(mask.all()):
        mask = None
    if mask is not None:
        return Texts.of_mask(mask, position_ids)
    if position_ids is None or position_ids.dim() != 2:
        return None
    texts = Texts.of_positions(position_ids)
    return texts if position_ids.is_cuda or bool(texts.start.any()) else None


class NSAForCausalLM(NSAPreTrainedModel, LlamaForCausalLM):
    """A causal language model with Native Sparse Attention, or with full attention to compare with.

    Example:
        >>> model = NSAForCausalLM(NSAConfig(hidden_size=256, num_hidden_layers=6, …))
        >>> model.save_pretrained("here"); AutoModelForCausalLM.from_pretrained("here")
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.model = NSAModel(config)
        if config.attention == "nsa" and config._attn_implementation != seam.NAME:
            self.set_attn_implementation(NATIVE)
        self.post_init()


AutoConfig.register("nsa", NSAConfig)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM)
