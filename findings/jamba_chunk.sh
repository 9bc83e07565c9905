#!/usr/bin/env bash
# Mamba, Falcon-Mamba and Jamba in transformers 5.24.0: a cache is used for ONE further token and ignored for several.
#
# Expected: a prompt continued by ten tokens gives the logits of one pass, as it does for every attention model, for Mamba-2, and
# for hybrids built on Mamba-2 (Bamba).
# Happens: the Mamba-1 mixer takes up its state only where the sequence has length 1; for more it starts from zero and then
# overwrites the cached state, without a word. In Jamba the attention layers do see the past, its Mamba layers do not.
# Matters to shared prefixes: demonstrations run once and continued by each question, prefix caching, speculative decoding.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=200, hidden_size=64, num_hidden_layers=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16, attn_layer_indices=[1])
FAMILIES = {
    "llama": SIZES | HEADS,
    "mamba2": SIZES | dict(state_size=8, num_heads=8, head_dim=16, n_groups=1, expand=2, chunk_size=16),
    "bamba": SIZES | HEADS | MAMBA2,
    "mamba": SIZES | dict(state_size=8),
    "falcon_mamba": SIZES | dict(state_size=8),
    "jamba": SIZES | HEADS | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=8),
}
STATES_ONLY = {"mamba", "mamba2", "falcon_mamba"}  # they know no positions


@torch.no_grad()
def continued(family, width):
    """30 tokens, then ten more in pieces of `width`: largest difference to one pass over all 40."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    for weight in lm.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(1, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    whole, out, found = lm(ids, use_cache=False).logits, lm(ids[:, :30], use_cache=True), []
    for i in range(30, 40, width):
        where = {} if family in STATES_ONLY else {"position_ids": torch.arange(i, i + width)[None]}
        out = lm(ids[:, i : i + width], cache=out.cache, use_cache=True, **where)
        found.append((out.logits - whole[:, i : i + width]).abs().max().item())
    return max(found)


for family in FAMILIES:
    one, ten = continued(family, 1), continued(family, 10)
    print(f"{family}: ten tokens after a cache, one by one {one:.1e}, at once {ten:.1e}")
    if one > 1e-3 or (ten > 0.1) != (family in ("mamba", "falcon_mamba", "jamba")):
        sys.exit(f"changed: {family} now treats several tokens after a cache otherwise")
PYTHON

# Seen:
#   llama: ten tokens after a cache, one by one 7.3e-06, at once 2.1e-06
#   mamba2: ten tokens after a cache, one by one 3.3e-06, at once 1.8e-06
#   bamba: ten tokens after a cache, one by one 5.8e-06, at once 1.8e-06
#   mamba: ten tokens after a cache, one by one 5.0e-06, at once 4.6e+00
#   falcon_mamba: ten tokens after a cache, one by one 4.5e-06, at once 2.5e+00
#   jamba: ten tokens after a cache, one by one 1.3e-05, at once 3.6e+00
