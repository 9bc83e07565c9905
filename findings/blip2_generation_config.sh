#!/usr/bin/env bash
# BLIP-2 in transformers 5.24.0: what its generation configuration says is not what `generate` does.
#
# Expected, as with LLaVA and every other model with images: `model.generation_config` (what generation_config.json fills) decides where
# `generate` leaves something open. Happens: BLIP-2's `generate` hands on to that of its language model, which reads its own configuration:
# the outer one's has no effect (a warning speaks of a default length, not of what was set). Arguments of the call itself are heeded.
# Matters because captions stop after the default 20 tokens, and a baseline that sets its decoding on the model measures another one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import (
    Blip2Config, Blip2ForConditionalGeneration, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
)

TEXT = dict(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
torch.manual_seed(0)
blip = Blip2ForConditionalGeneration(
    Blip2Config(
        vision_config=VISION,
        qformer_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, encoder_hidden_size=32),
        text_config=dict(model_type="opt", ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=128, eos_token_id=None, **TEXT),
        num_query_tokens=4,
        image_token_index=99,
    )
).eval()
llava = LlavaForConditionalGeneration(
    LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(intermediate_size=32, eos_token_id=None, **TEXT),
        image_token_index=99,
        vision_feature_layer=-1,
    )
).eval()
found = {}
for name, model in (("llava", llava), ("blip-2", blip)):
    ids = torch.tensor([[99] * 4 + [5, 6, 7]])
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=45, eos_token_id=None, pad_token_id=0)
    given = dict(input_ids=ids, pixel_values=torch.zeros(1, 3, 16, 16), attention_mask=torch.ones_like(ids))
    left = model.generate(**given).shape[1] - 7
    asked = model.generate(**given, max_new_tokens=45).shape[1] - 7
    found[name] = left, asked
    print(f"{name}: {left} new tokens with max_new_tokens=45 on the model, {asked} with it in the call")
if found != {"llava": (45, 45), "blip-2": (20, 45)}:
    sys.exit(f"changed: {found}")
PYTHON

# Seen:
#   llava: 45 new tokens with max_new_tokens=45 on the model, 45 with it in the call
#   blip-2: 20 new tokens with max_new_tokens=45 on the model, 45 with it in the call
