#!/usr/bin/env bash
# DeepSeek-V3.2 in transformers 5.24.0 (torch 2.15.0, CPU): a token appended at the END changes the logits of earlier positions.
#
# Expected: a causal language model. Whatever follows position i, the logits at i stay what they were.
# Happens: beyond index_topk tokens they change. The index score of a key is a weighted sum of ReLUs, so every key whose products are
# all negative scores exactly 0.0, and torch.topk settles such ties by an order that depends on the length of the row, masked future
# included. Exchanging a later token changes nothing, only their number does: the usual test of causality passes.
# Matters because the set of tokens that a head may attend to is then no function of the prefix: teacher forcing, right padding, a
# growing prompt and a batch with a longer neighbour each look at other tokens. The more index heads, the rarer the ties.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM


def model(index_heads, topk):
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=200, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, index_n_heads=index_heads, index_head_dim=16, index_topk=topk,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
        first_k_dense_replace=2, attn_implementation="eager",
    )  # fmt: skip
    made = DeepseekV32ForCausalLM(config).eval()
    for weight in made.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return made


@torch.no_grad()
def compare(lm):
    """Largest change among the first 120 positions: of appended tokens, and of another last token."""
    ids = torch.randint(0, 200, (1, 400), generator=torch.Generator().manual_seed(1))
    alone = lm(ids[:, :120]).logits
    other = ids[:, :120].clone()
    other[0, -1] = (other[0, -1] + 1) % 200
    longer = [(lm(ids[:, :n]).logits[:, :120] - alone).abs() for n in (121, 128, 400)]
    exchanged = (lm(other).logits - alone)[:, :-1].abs().max().item()
    return [d.max().item() for d in longer], [int((d.amax(-1) > 1e-3).sum()) for d in longer], exchanged


for heads, topk in ((2, 32), (4, 32), (2, 512)):
    change, rows, exchanged = compare(model(heads, topk))
    print(f"index heads {heads}, topk {topk}: 1, 8 and 280 tokens appended change the first 120 rows by",
          *(f"{c:.3f} ({r} rows)" for c, r in zip(change, rows)), f"| last token exchanged: {exchanged:.1e}")
    if exchanged > 1e-4:
        sys.exit("changed: a later token now leaks by its value, too")
    if (max(change) > 0.1) != (topk == 32):
        sys.exit("changed: appended tokens no longer change earlier rows exactly where topk is shorter than the prompt")
PYTHON

# Seen:
#   index heads 2, topk 32: 1, 8 and 280 tokens appended change the first 120 rows by 1.030 (14 rows) 5.529 (79 rows) 5.529 (80
#   rows) | last token exchanged: 0.0e+00
#   index heads 4, topk 32: 1, 8 and 280 tokens appended change the first 120 rows by 0.000 (0 rows) 3.148 (32 rows) 3.145 (32
#   rows) | last token exchanged: 0.0e+00
#   index heads 2, topk 512: 1, 8 and 280 tokens appended change the first 120 rows by 0.000 (0 rows) 0.000 (0 rows) 0.000 (0
#   rows) | last token exchanged: 0.0e+00
