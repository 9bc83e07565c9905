#!/usr/bin/env bash
# DeepSeek-V3.2 and its kin in transformers 5.24.0: the NAME of the attention function decides whether attention is sparse.
#
# Expected: transformers' own eager function (and its own mask) registered under a second name computes the same model; this is
# how one records or edits attention, and for Llama or DeepSeek-V3 it holds to the last bit.
# Happens: the modules write the index's choice into the mask only where config._attn_implementation is "eager" or "sdpa"; under any
# other name they hand it over as `indices`, which a function that takes **kwargs ignores: dense attention, no error, no warning.
# Up to index_topk tokens nothing shows, so a short test prompt passes.
# Matters to everyone who studies attention through AttentionInterface.register: beyond the top-k they study another model.
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
from transformers.masking_utils import eager_mask
from transformers.models.deepseek_v32.modeling_deepseek_v32 import eager_attention_forward

AttentionInterface.register("same_by_another_name", eager_attention_forward)
AttentionMaskInterface.register("same_by_another_name", eager_mask)

SIZES = dict(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
LATENT = dict(
    moe_intermediate_size=48, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
INDEX = dict(index_n_heads=2, index_head_dim=16, index_topk=8)
FAMILIES = {
    "llama": SIZES, "deepseek_v3": SIZES | LATENT,
    "deepseek_v32": SIZES | LATENT | INDEX, "glm_moe_dsa": SIZES | LATENT | INDEX,
}  # fmt: skip


@torch.no_grad()
def difference(family, length):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in lm.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(1, 200, (1, length), generator=torch.Generator().manual_seed(1))
    eager = lm(ids, use_cache=False).logits
    lm.set_attn_implementation("same_by_another_name")
    return (lm(ids, use_cache=False).logits - eager).abs().max().item()


for family in FAMILIES:
    short, long = difference(family, 8), difference(family, 40)
    print(f"{family}: same function, other name: 8 tokens {short:.1e}, 40 tokens {long:.3f}")
    if short > 1e-4 or (long > 0.1) != ("index_topk" in FAMILIES[family]):
        sys.exit(f"changed: the name of the attention function no longer decides in {family}")
PYTHON

# Seen:
#   llama: same function, other name: 8 tokens 0.0e+00, 40 tokens 0.000
#   deepseek_v3: same function, other name: 8 tokens 0.0e+00, 40 tokens 0.000
#   deepseek_v32: same function, other name: 8 tokens 0.0e+00, 40 tokens 7.758
#   glm_moe_dsa: same function, other name: 8 tokens 0.0e+00, 40 tokens 7.997
