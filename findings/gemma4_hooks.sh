#!/usr/bin/env bash
# Gemma 4 with shared keys and values (the layout of E2B and E4B) in transformers 5.24.0: `generate` hides the prompt from hooks.
#
# Expected: a forward hook on a layer sees all positions of the prompt; logits_to_keep, which `generate` sets to 1, only saves the
# head. Happens: with an integer logits_to_keep the positions are cut before the first layer that shares keys and values; that
# layer and all above see one row. Asking for hidden states or attentions switches the cut off, a hook does not.
# Matters to activations captured while a model answers: a mean over the prompt is the last token alone, rows[:, p : p + 1] is empty
# and rows[:, 0] is the end, without an error, in the upper layers only.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv -q --python 3.11 "$work/env"
uv pip install -q --python "$work/env" torch==2.15.0 transformers==5.24.0

"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

torch.manual_seed(0)
config = Gemma4TextConfig(
    vocab_size=200, vocab_size_per_layer_input=200, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
    num_kv_shared_layers=2, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 2,
    attn_implementation="eager",
)  # fmt: skip
lm = Gemma4ForCausalLM(config).eval()
ids = torch.randint(1, 200, (1, 20), generator=torch.Generator().manual_seed(1))


def rows(**kwargs):
    """How many positions a hook on each layer sees."""
    seen = []
    hooks = [layer.register_forward_hook(lambda module, args, out: seen.append(len(out[0]))) for layer in lm.model.layers]
    with torch.no_grad():
        lm(ids, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


whole, one, maps = rows(), rows(logits_to_keep=1), rows(logits_to_keep=1, output_attentions=True)
print(f"positions seen by a hook on each layer: plain {whole}, logits_to_keep=1 {one}, with output_attentions {maps}")
seen = []
hook = lm.model.layers[3].register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
lm.generate(ids, max_new_tokens=2, do_sample=False)
hook.remove()
print(f"in generate the last layer sees {seen}")
if whole != [20] * 4 or maps != [20] * 4 or one != [20, 20, 1, 1] or seen[0] != 1:
    sys.exit("changed: layers with shared keys and values now see other positions")
PYTHON

# Seen:
#   positions seen by a hook on each layer: plain [20, 20, 20, 20], logits_to_keep=1 [20, 20, 1, 1], with output_attentions
#   [20, 20, 20, 20]
#   in generate the last layer sees [1, 1]
