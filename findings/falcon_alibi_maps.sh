#!/usr/bin/env bash
# Falcon with alibi=True (Falcon-RW) in transformers 5.24.0: asking for attention maps changes the model.
#
# Expected: output_attentions=True returns the weights that were used; eager and sdpa differ by rounding.
# Happens: the bias is built into the mask AND added to the scores by the eager branch, so it counts twice there; sdpa has it once.
# output_attentions=True leaves sdpa for that branch: logits change, and the maps are softmax((q·k + 2·bias)/√d) instead of
# softmax((q·k + bias)/√d). Reported for 4.39 (huggingface/transformers#29946) and still so.
# Matters because every attention map of such a checkpoint, and everything computed in eager mode, belongs to a model with twice
# the recency bias of the one that was trained and that generates.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import math
import sys

import torch
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

HEADS, WIDTH, N = 4, 64, 30


def make(implementation):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=200, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, alibi=True, multi_query=False,
        parallel_attn=False, bias=True, attn_implementation=implementation,
    )  # fmt: skip
    lm = FalconForCausalLM(config).eval()
    for weight in lm.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return lm


sdpa, eager = make("sdpa"), make("eager")
ids = torch.randint(1, 200, (1, N), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    plain, asked = sdpa(ids), sdpa(ids, output_attentions=True)
    other = eager(ids)
    # The first layer's weights by hand, from its queries and keys, with the bias once and twice.
    block = sdpa.transformer.h[0]
    q, k, v = block.self_attention._split_heads(
        block.self_attention.query_key_value(block.input_layernorm(sdpa.transformer.word_embeddings(ids)))
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    bias = build_alibi_tensor(torch.ones_like(ids), HEADS, torch.float32).view(1, HEADS, 1, N)
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    maps = [((scores + n * bias) / math.sqrt(WIDTH // HEADS)).masked_fill(future, -math.inf).softmax(-1) for n in (1, 2)]
    # What sdpa adds to the residual stream in the first layer, against the maps with the bias once.
    wanted = [block.self_attention.dense(torch.einsum("bhij,bjhd->bihd", m, v).flatten(2)) for m in maps]
    seen = {}
    block.self_attention.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    sdpa(ids)


def off(a, b):
    return (a - b).abs().max().item()


print(f"logits: sdpa against sdpa with output_attentions {off(plain.logits, asked.logits):.3f}, that against eager {off(asked.logits, other.logits):.1e}")
print(f"returned map of layer 0 against the bias once {off(asked.attentions[0], maps[0]):.3f}, twice {off(asked.attentions[0], maps[1]):.1e}")
print(f"sdpa's output of layer 0 against the bias once {off(seen['out'], wanted[0]):.1e}, twice {off(seen['out'], wanted[1]):.3f}")
if off(plain.logits, asked.logits) < 0.1 or off(asked.attentions[0], maps[1]) > 1e-4 or off(seen["out"], wanted[0]) > 1e-4:
    sys.exit("changed: the bias no longer counts twice where maps are asked for")
PYTHON

# Seen:
#   logits: sdpa against sdpa with output_attentions 1.506, that against eager 0.0e+00
#   returned map of layer 0 against the bias once 0.182, twice 6.0e-08
#   sdpa's output of layer 0 against the bias once 1.2e-06, twice 0.856
