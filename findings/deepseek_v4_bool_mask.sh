#!/usr/bin/env bash
# DeepSeek-V4 in transformers 5.24.0: under a boolean mask the compressed entries are shown exactly where they should be hidden.
#
# Expected: transformers has two forms of mask, additive (0 and -inf) and boolean (True = attend); an attention function registered
# with either computes the same model, as Llama and DeepSeek-V3 do.
# Happens: V4 appends to the mask a block for its compressed keys, made additive (0 = visible, -inf = hidden) and cast to the dtype
# of the mask. As a boolean 0 becomes False and -inf becomes True: what was visible is hidden, the future's entries are visible.
# Matters to attention functions of one's own, registered with sdpa_mask as the guides do: logits look sane and see the future.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import eager_mask, sdpa_mask


def attention(module, query, key, value, mask, scaling, dropout=0.0, s_aux=None, **kwargs):
    """Softmax attention, with sinks where a model has them, that understands both forms of mask."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


for name, mask_function in (("additive", eager_mask), ("boolean", sdpa_mask)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask_function)

SIZES = dict(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
LATENT = dict(
    moe_intermediate_size=48, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
V4 = dict(
    moe_intermediate_size=48, q_lora_rank=24, head_dim=16, o_lora_rank=16, o_groups=2, index_n_heads=2, index_head_dim=16,
    index_topk=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, sliding_window=16,
)  # fmt: skip
ids = torch.randint(1, 200, (2, 40), generator=torch.Generator().manual_seed(1))
ids[0, :4] = 0
mask = (torch.arange(40) >= torch.tensor([[4], [0]])).long()  # one padded row, so that a mask is made at all
other = ids.clone()
other[1, 30] = (other[1, 30] + 1) % 199 + 1

for family, sizes in (("llama", SIZES), ("deepseek_v3", SIZES | LATENT), ("deepseek_v4", SIZES | {"num_key_value_heads": 1} | V4)):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager").eval()
    for weight in lm.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    found = {}
    with torch.no_grad():
        eager = lm(ids, attention_mask=mask, use_cache=False).logits[1]
        for name in ("additive", "boolean"):
            lm.set_attn_implementation(name)
            got, changed = (lm(x, attention_mask=mask, use_cache=False).logits[1] for x in (ids, other))
            found[name] = (got - eager).abs().max().item(), (changed - got)[:30].abs().max().item()
    print(f"{family}:", *(f"{n} mask {o:.1e} from eager, token 30 moves earlier logits by {c:.1e};" for n, (o, c) in found.items()))
    if found["additive"][0] > 1e-4 or (found["boolean"][0] > 0.05) != (family == "deepseek_v4"):
        sys.exit(f"changed: {family} now reads a boolean mask otherwise")
PYTHON

# Seen:
#   llama: additive mask 0.0e+00 from eager, token 30 moves earlier logits by 0.0e+00; boolean mask 0.0e+00 from eager, token
#   30 moves earlier logits by 0.0e+00;
#   deepseek_v3: additive mask 0.0e+00 from eager, token 30 moves earlier logits by 0.0e+00; boolean mask 0.0e+00 from eager,
#   token 30 moves earlier logits by 0.0e+00;
#   deepseek_v4: additive mask 0.0e+00 from eager, token 30 moves earlier logits by 0.0e+00; boolean mask 1.4e+00 from eager,
#   token 30 moves earlier logits by 5.2e-01;
