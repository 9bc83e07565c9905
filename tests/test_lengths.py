"""Lengths at which a family changes: found in its configuration, and nothing is run across one that matters."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from families import GROUPED, POSITIONS, WIDE, randomised
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from anchors.analyses.flow import InformationFlow
from anchors.compression import AnchorCache, compress
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.model.language import load
from anchors.model.lengths import alike, changes, groups, side
from anchors.study.runner import batches
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.task import TASKS

SMALL = POSITIONS | {"vocab_size": 2000}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1,
    "index_n_heads": 16, "index_head_dim": 8,
}  # fmt: skip
BLOCKS = {
    "head_dim": 8, "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "num_local_experts": 2,
    "num_experts_per_tok": 1, "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4, "index_local_blocks": 1, "rope_parameters": PLAIN | {"partial_rotary_factor": 1.0},
}  # fmt: skip


def longrope(threshold):
    return hf.Phi3Config(
        **GROUPED, **SMALL, pad_token_id=0, original_max_position_embeddings=threshold,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0],
            "original_max_position_embeddings": threshold, "partial_rotary_factor": 1.0,
            "factor": 4.0, "attention_factor": 1.0,
        },
    )  # fmt: skip


def dynamic(threshold):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return hf.LlamaConfig(**GROUPED, vocab_size=2000, max_position_embeddings=threshold, rope_parameters=rope)


CHANGED = {
    "sliding window": (lambda n: hf.MistralConfig(**GROUPED, **SMALL, sliding_window=n), 10),
    "attention chunk": (
        lambda n: hf.Llama4TextConfig(
            **GROUPED, **SMALL, head_dim=8, attention_chunk_size=n, num_local_experts=2, num_experts_per_tok=1,
            intermediate_size_mlp=48, attn_temperature_tuning=False,
        ),
        10,
    ),
    "local attention": (
        lambda n: hf.GPTNeoConfig(
            hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=n, **SMALL,
        ),
        10,
    ),
    "kept keys (top-k)": (lambda n: hf.DogeConfig(**GROUPED, **SMALL, keep_window_size=n), 10),
    "sparse index (top-k)": (lambda n: hf.DeepseekV32Config(**WIDE, **SMALL, **LATENT, index_topk=n), 10),
    "sparse index (top-k) of blocks": (
        lambda n: hf.MiniMaxM3VLTextConfig(**GROUPED, **SMALL, **BLOCKS, index_topk_blocks=n // 4), 12,
    ),
    "longrope's original context": (longrope, 10),
    "dynamic NTK": (dynamic, 10),
}  # fmt: skip


def own(config):
    """transformers' own model of a configuration, on its eager attention."""
    config._attn_implementation = "eager"
    return randomised(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval(), seed=0)


@torch.no_grad()
def last_logits(model, ids):
    ids = torch.tensor([list(ids)])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("what", sorted(CHANGED))
def test_attention_changes_just_beyond_the_length(what):
    """Against the model's own attention with the change far away: the same up to the length, another one beyond."""
    config, length = CHANGED[what]
    found = [c for c in changes(config(length)) if c.length == length]
    assert [c.what for c in found] == [what.removesuffix(" of blocks")]
    near, far = own(config(length)), own(config(400))
    ids = torch.randint(1, 2000, (length + 1,), generator=torch.Generator().manual_seed(3)).tolist()
    torch.testing.assert_close(last_logits(near, ids[:-1]), last_logits(far, ids[:-1]), rtol=1e-4, atol=1e-4)
    off = (last_logits(near, ids) - last_logits(far, ids)).abs().max()
    assert off > 5e-4


def test_what_a_configuration_does_not_use_is_no_change():
    assert changes(hf.GPT2Config()) == ()
    assert changes(hf.LlamaConfig()) == ()
    assert changes(hf.Qwen2Config(use_sliding_window=False, sliding_window=16)) == ()
    assert (
        changes(hf.Gemma3TextConfig(num_hidden_layers=1, layer_types=["full_attention"], sliding_window=16))
        == ()
    )
    [yarn] = changes(
        hf.LlamaConfig(
            rope_parameters=PLAIN
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9}
        )
    )
    assert (yarn.length, yarn.rotary) == (9, False)


def test_several_changes_stand_in_order_without_doubles():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"full_attention": longrope(99).rope_parameters, "sliding_attention": PLAIN}
    config = hf.Gemma3TextConfig(
        **GROUPED, **SMALL, head_dim=8, layer_types=layers, sliding_window=16, rope_parameters=rope
    )
    assert [(c.length, c.rotary) for c in changes(config)] == [(16, False), (99, True)]


def test_groups_lie_on_one_side_and_keep_every_prompt():
    found, dynamically = changes(longrope(50)), changes(dynamic(50))
    lengths = [40, 60, 50, 51, 60]
    assert groups((), lengths) == [[0, 1, 2, 3, 4]]
    assert groups(found, lengths) == [[0, 2], [1, 3, 4]]
    assert groups(dynamically, lengths) == [[0, 2], [1, 4], [3]]
    assert side(found, 51) == side(found, 400) != side(found, 50)
    assert side(dynamically, 51) != side(dynamically, 52)
    index = changes(CHANGED["sparse index (top-k)"][0](50))
    assert side(index, 51) == side(index, 60)
    assert alike(index, 51) != alike(index, 60)


@pytest.fixture(scope="module")
def three(tokenizer):
    """Prompts of three lengths."""
    task = TASKS["sst2"]
    drawn = [draw(task, read(task), tokenizer, Draw(shots=shots), 1)[0] for shots in (1, 2, 4)]
    assert len({len(d.prompt.ids) for d in drawn}) == 3
    return sorted(drawn, key=lambda d: len(d.prompt.ids))


@pytest.fixture(scope="module")
def rotary(three, tokenizer):
    """By kind: a model whose change lies between the first and the second length, and its own untouched twin."""
    short, middle, _ = (len(d.prompt.ids) for d in three)
    found = {}
    for name, made in (("longrope", longrope), ("dynamic", dynamic)):
        model = own(made((short + middle) // 2))
        found[name] = load(copy.deepcopy(model), tokenizer=tokenizer, device="cpu"), model
    return found


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_prompt_does_not_depend_on_its_neighbours_nor_on_history(kind, rotary, three):
    lm, fresh = rotary[kind]
    prompts = [three[i].prompt for i in (2, 0, 1, 2)]
    found = flow(lm, prompts, maps=[1])
    for i, prompt in enumerate(prompts):
        right = last_logits(copy.deepcopy(fresh), prompt.ids)[list(prompt.label_ids)].softmax(-1)
        torch.testing.assert_close(found.probabilities[i], right, rtol=1e-3, atol=1e-5)
        alone, size = flow(lm, [prompt], maps=[1]), len(prompt.ids)
        torch.testing.assert_close(found.sums.s_pq[i], alone.sums.s_pq[0])
        torch.testing.assert_close(found.maps[1][i, :size, :size], alone.maps[1][0])
        assert not found.maps[1][i, size:].any()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_batch_across_the_length_is_refused_where_it_is_run(kind, rotary, three):
    lm, _ = rotary[kind]
    with pytest.raises(AnchorsError, match=r"share a batch"):
        answer(lm, None, queries([d.prompt for d in three[:2]], 0, "cpu"))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_runner_batches_by_side(kind, rotary, three):
    lm, _ = rotary[kind]
    units = {(1, n): three[n % 3] for n in range(7)}
    found = list(batches(lm, InformationFlow(), units, list(units), 4))
    assert sorted(unit for batch in found for unit in batch) == sorted(units)
    for batch in found:
        assert len({alike(lm.changes, len(units[u].prompt.ids)) for u in batch}) == 1


def test_a_context_is_continued_on_its_own_side_only(rotary, three):
    """Demonstrations that are long themselves are continued, short ones not across the length; shortening helps not."""
    lm, fresh = rotary["longrope"]
    threshold, long = lm.changes[0].length, three[2].prompt
    cut = threshold + 5
    context = encode(lm, long.ids[:cut])
    found = answer(lm, context, queries([long], cut, "cpu"))[0]
    torch.testing.assert_close(found, last_logits(fresh, long.ids), rtol=1e-3, atol=1e-3)
    short = encode(lm, long.ids[: threshold - 5])
    for context in (short, compress(short, range(9), "original")):
        with pytest.raises(
            AnchorsError, match=f"longer than {threshold} tokens .longrope's original context"
        ):
            answer(lm, context, queries([long], threshold - 5, "cpu"))
    with pytest.raises(AnchorsError, match="shots"):
        encode(lm, long.ids[threshold - 5 :], short)
    kept = compress(short, range(9), "original")
    for new, right in ((3, True), (8, False)):
        inputs = AnchorCache(kept, 0, lm.changes).inputs(long.ids[threshold - 5 : threshold - 3])
        with nullcontext() if right else pytest.raises(AnchorsError, match="longrope"):
            lm.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def test_dynamic_positions_are_shared_below_the_length_only(rotary, three):
    lm, fresh = rotary["dynamic"]
    short, long = three[0].prompt, three[2].prompt
    flow(lm, [long])
    context = encode(lm, short.ids[:9])
    found = answer(lm, context, queries([short], 9, "cpu"))[0]
    torch.testing.assert_close(found, last_logits(copy.deepcopy(fresh), short.ids), rtol=1e-3, atol=1e-3)
    with pytest.raises(AnchorsError, match="dynamic NTK"):
        answer(lm, encode(lm, long.ids[:-5]), queries([long], len(long.ids) - 5, "cpu"))
