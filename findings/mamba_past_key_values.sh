#!/usr/bin/env bash
# Mamba, Mamba-2 and Falcon-Mamba in transformers 5.24.0: what comes out under a name is thrown away when it goes in under it.
#
# 5.24 renamed past_key_values and cache_params to `cache`. Expected: the old names go on working, or raise. For attention models
# past_key_values does, with a warning. Happens: a Mamba output answers to .past_key_values (one notice says that it is deprecated), its forward
# swallows past_key_values=... in **kwargs without a word and starts from an empty state; only cache and cache_params are read.
# Matters because the loop `out = model(next, past_key_values=out.past_key_values)`, right for all other families, runs and
# yields logits of one token without any context.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore", FutureWarning)
SIZES = dict(vocab_size=200, hidden_size=64, num_hidden_layers=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
FAMILIES = {
    "llama": SIZES | HEADS,
    "mamba": SIZES | dict(state_size=8),
    "falcon_mamba": SIZES | dict(state_size=8),
    "mamba2": SIZES | dict(state_size=8, num_heads=8, head_dim=16, n_groups=1, expand=2, chunk_size=16),
}


@torch.no_grad()
def step(family, name):
    """Logits of token 31 after a cache of 30 that is handed over under `name`: distance to one pass, and to the token alone."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    for weight in lm.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(1, 200, (1, 31), generator=torch.Generator().manual_seed(1))
    whole, alone = lm(ids, use_cache=False).logits[:, -1], lm(ids[:, 30:], use_cache=False).logits[:, -1]
    out = lm(ids[:, :30], use_cache=True)
    got = lm(ids[:, 30:], use_cache=True, **{name: getattr(out, name)}).logits[:, -1]
    return (got - whole).abs().max().item(), (got - alone).abs().max().item()


swallowed = set()
for family in FAMILIES:
    for name in ("cache", "past_key_values") if family == "llama" else ("cache", "past_key_values", "cache_params"):
        whole, alone = step(family, name)
        print(f"{family}, {name}=out.{name}: {whole:.1e} from one pass over all, {alone:.1e} from the token alone")
        if whole > 0.1:
            swallowed.add((family, name))
wanted = {(f, "past_key_values") for f in ("mamba", "falcon_mamba", "mamba2")}
if swallowed != wanted:
    sys.exit(f"changed: the names that are swallowed are now {sorted(swallowed)}")
PYTHON

# Seen:
#   llama, cache=out.cache: 2.9e-06 from one pass over all, 5.8e+00 from the token alone
#   llama, past_key_values=out.past_key_values: 2.9e-06 from one pass over all, 5.8e+00 from the token alone
#   mamba, cache=out.cache: 3.6e-06 from one pass over all, 5.1e+00 from the token alone
#   mamba, past_key_values=out.past_key_values: 5.1e+00 from one pass over all, 8.3e-07 from the token alone
#   mamba, cache_params=out.cache_params: 3.6e-06 from one pass over all, 5.1e+00 from the token alone
#   falcon_mamba, cache=out.cache: 2.1e-06 from one pass over all, 4.6e+00 from the token alone
#   falcon_mamba, past_key_values=out.past_key_values: 4.6e+00 from one pass over all, 9.5e-07 from the token alone
#   falcon_mamba, cache_params=out.cache_params: 2.1e-06 from one pass over all, 4.6e+00 from the token alone
#   mamba2, cache=out.cache: 2.1e-06 from one pass over all, 5.8e+00 from the token alone
#   mamba2, past_key_values=out.past_key_values: 5.8e+00 from one pass over all, 7.2e-07 from the token alone
#   mamba2, cache_params=out.cache_params: 2.1e-06 from one pass over all, 5.8e+00 from the token alone
