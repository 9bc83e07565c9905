#!/usr/bin/env bash
# BLT (Byte Latent Transformer) in transformers 5.24.0 with max_patch_length set: the last position gets other logits than the same
# position inside a longer text.
#
# Expected: teacher forcing and step-by-step prediction see the same logits at each position, as a causal model must give.
# Happens: when the entropy after the last byte opens a new patch, that patch has length zero; without max_patch_length it is kept
# and the last byte is decoded from it, with max_patch_length zero-length patches are dropped and the byte is decoded from the
# patch before. As soon as one more byte follows, the patch exists and the logits at that position are others.
# Matters because a likelihood over a text and the generation of it, which only ever uses the last position, are two models.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import BltConfig, BltForCausalLM

PART = dict(
    hidden_size=64, hidden_size_global=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=260, cross_attn_k=1,
)  # fmt: skip


def make(longest):
    torch.manual_seed(0)
    config = BltConfig(
        vocab_size=260, cross_attn_k=1, encoder_hash_byte_group_vocab=300, encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_nb_functions=1, max_patch_length=longest, patcher_config=PART, encoder_config=PART,
        decoder_config=PART, global_config=PART, attn_implementation="eager",
    )  # fmt: skip
    lm = BltForCausalLM(config).eval()
    for weight in lm.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return lm


ids = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(1))
for longest in (None, 8):
    lm = make(longest)
    with torch.no_grad():
        whole = lm(ids, use_cache=False).logits[0]
        off = [(lm(ids[:, : n + 1], use_cache=False).logits[0] - whole[: n + 1]).abs().amax(-1) for n in range(20, 39)]
    last, before = sum(int(o[-1] > 1e-3) for o in off), sum(int((o[:-1] > 1e-3).sum()) for o in off)
    print(f"max_patch_length {longest}: of 19 prefixes {last} end on other logits than the whole text has there",
          f"(largest difference {max(o[-1].item() for o in off):.3f}); positions before the end that differ: {before}")
    if before or (last > 0) != (longest is not None):
        sys.exit("changed: the last position now agrees or disagrees otherwise")
PYTHON

# Seen:
#   max_patch_length None: of 19 prefixes 0 end on other logits than the whole text has there (largest difference 0.000);
#   positions before the end that differ: 0
#   max_patch_length 8: of 19 prefixes 19 end on other logits than the whole text has there (largest difference 3.835);
#   positions before the end that differ: 0
