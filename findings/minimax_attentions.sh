#!/usr/bin/env bash
# MiniMax (Text-01) in transformers 5.24.0: among output_attentions are matrices that are no attention.
#
# Expected: each entry has the shape (batch, heads, queries, keys), or is None for a layer of linear attention.
# Happens: the lightning layers record their running state, the decayed sum of key ⊗ value, of shape (batch, heads, head_dim,
# head_dim): four axes and square like an attention map, but over channels, with entries of any sign and size. Where the prompt
# has head_dim tokens not even the shape tells.
# Matters to rollout, averages over layers and plots, which take them for maps without a complaint.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

torch.manual_seed(0)
config = MiniMaxConfig(
    vocab_size=200, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, block_size=8, num_local_experts=2, num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"],
    attn_implementation="eager",
)  # fmt: skip
lm = MiniMaxForCausalLM(config).eval()
for weight in lm.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.2)
seen = {}
mixer = lm.model.layers[0].self_attn
mixer.qkv_proj.register_forward_hook(lambda module, args, out: seen.update(qkv=mixer.act_fn(out)))

for length in (40, 16):
    ids = torch.randint(1, 200, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        linear, full = lm(ids, output_attentions=True, use_cache=False).attentions
    # The state by hand: Σ_j exp(-slope · (n - 1 - j)) k_j ⊗ v_j.
    _, k, v = seen["qkv"].view(length, 4, 48).split(16, -1)
    decay = torch.exp(-mixer.slope_rate.view(1, 4) * (length - 1 - torch.arange(length)).view(-1, 1))
    state = torch.einsum("jh,jhc,jhd->hcd", decay, k, v)
    rows, off = linear.sum(-1), (linear[0] - state).abs().max().item() / state.abs().max().item()
    print(f"{length} tokens: full attention {tuple(full.shape)}, rows sum to 1 within {(full.sum(-1) - 1).abs().max():.1e};",
          f"linear attention {tuple(linear.shape)}, rows sum to {rows.min():.2f} … {rows.max():.2f}, entries above the diagonal",
          f"{linear.triu(1).abs().max():.2f}, relative distance to the state {off:.1e}")
    if linear.shape != (1, 4, 16, 16) or off > 1e-4:
        sys.exit("changed: MiniMax's linear layers no longer return their state as attention")
PYTHON

# Seen:
#   40 tokens: full attention (1, 4, 40, 40), rows sum to 1 within 2.4e-07; linear attention (1, 4, 16, 16), rows sum to -3.39
#   … 217.05, entries above the diagonal 34.42, relative distance to the state 1.7e-07
#   16 tokens: full attention (1, 4, 16, 16), rows sum to 1 within 1.2e-07; linear attention (1, 4, 16, 16), rows sum to -6.17
#   … 108.77, entries above the diagonal 28.03, relative distance to the state 1.4e-07
