"""Families whose layers do more than attend to keys and values of their own: exact, or refused with the true reason."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from common import apart
from families import GROUPED, WIDE, randomised
from test_lengths import BLOCKS, LATENT, SMALL
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from anchors.analyses.causal import Causal
from anchors.analyses.diagnosis import Diagnosis
from anchors.analyses.isolation import Isolation, isolated_contexts
from anchors.certificate.sight import hidden_labels
from anchors.compression import anchor_tokens, compress
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError, RoutingError
from anchors.flow import flow
from anchors.model.language import load
from anchors.patching import demand_one_stream, streams
from anchors.reweighting import Beta, fit, label_head, literal_loss, new_beta, one_token_loss

ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
GEMMA4 = {
    "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16, "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 2000,
}  # fmt: skip

CONFIGS = {
    "sparse index": hf.DeepseekV32Config(**WIDE, **SMALL, **LATENT, index_topk=20),
    "equal scores": hf.DeepseekV32Config(**WIDE, **SMALL, **LATENT | {"index_n_heads": 2}, index_topk=8),
    "sparse index handed on": hf.GlmMoeDsaConfig(
        **WIDE, **SMALL, **LATENT, index_topk=20, indexer_types=["full", "shared", "full"]
    ),
    "sparse index of blocks": hf.MiniMaxM3VLTextConfig(**GROUPED, **SMALL, **BLOCKS, index_topk_blocks=3),
    "mask of the values": hf.DogeConfig(**GROUPED, **SMALL),
    "kept keys": hf.DogeConfig(**GROUPED, **SMALL, keep_window_size=20),
    "latent keys": hf.DeepseekV3Config(**WIDE, **SMALL, **{k: v for k, v in LATENT.items() if "index" not in k}),
    "shared keys": hf.Gemma4TextConfig(**GROUPED | SMALL | GEMMA4 | ALTERNATING, num_kv_shared_layers=2),
    "heads by layer": hf.LagunaConfig(
        **GROUPED, **SMALL, head_dim=8, num_attention_heads_per_layer=[4, 8, 4], sliding_window=400, num_experts=4,
        num_experts_per_tok=2, layer_types=["full_attention", "sliding_attention", "full_attention"],
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "attention chunks": hf.Llama4TextConfig(
        **GROUPED, **SMALL, head_dim=8, attention_chunk_size=16, num_local_experts=2, num_experts_per_tok=1,
        intermediate_size_mlp=48, layer_types=["chunked_attention", "full_attention", "chunked_attention"],
    ),
    "state beside attention": hf.FalconH1Config(
        **GROUPED, **SMALL, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_expand=2, mamba_chunk_size=16,
    ),
    "several streams": hf.Gemma3nTextConfig(
        **GROUPED | SMALL, head_dim=8, sliding_window=16, hidden_size_per_layer_input=4, vocab_size_per_layer_input=2000,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=None,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip
SHARING = sorted(set(CONFIGS) - {"state beside attention", "kept keys", "equal scores"})


class Family:
    """A model on the seam, and the same one as transformers made it, on its own eager attention."""

    def __init__(self, config, tokenizer):
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        self.own = randomised(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval(), seed=7)
        self.lm = load(copy.deepcopy(self.own), tokenizer=tokenizer, device="cpu")

    def plainly(self, ids, hidden=None):
        """Last logits and every attention matrix of a prompt; `hidden` maps layers to pairs (query, key)."""
        names = [n for module in self.lm.modules for n, m in self.lm.model.named_modules() if m is module]
        handles = []
        for layer, pairs in (hidden or {}).items():

            def hook(module, args, options, pairs=pairs):
                mask = options["attention_mask"].clone()
                for query, key in pairs:
                    mask[:, :, query, key] = torch.finfo(mask.dtype).min
                return args, options | {"attention_mask": mask}

            module = self.own.get_submodule(names[layer])
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        tokens = torch.tensor([list(ids)])
        with torch.no_grad():
            found = self.own(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
                output_attentions=True,
            )
        for handle in handles:
            handle.remove()
        return found.logits[0, -1], found.attentions

    def maps(self, prompt):
        """|Σ_h A ⊙ ∂L/∂A| by layer, under autograd of the model's own attention."""
        model = copy.deepcopy(self.own).requires_grad_(True)
        tokens = torch.tensor([prompt.ids])
        found = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, output_attentions=True
        )
        loss = F.cross_entropy(found.logits[0, -1, list(prompt.label_ids)][None], torch.tensor([prompt.gold]))
        gradients = torch.autograd.grad(loss, found.attentions)
        flows = [
            (a * g).sum(1)[0].abs().fill_diagonal_(0)
            for a, g in zip(found.attentions, gradients, strict=True)
        ]
        return torch.stack(flows).detach()


@pytest.fixture(scope="module")
def families(tokenizer):
    made = {}
    return lambda name: (
        made.setdefault(name, None) or made.update({name: Family(CONFIGS[name], tokenizer)}) or made[name]
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_answers_and_maps_are_the_models_own(name, families, make_cell):
    family, prompts = families(name), [d.prompt for d in make_cell(examples=2).prompts]
    found = flow(family.lm, prompts, maps=range(family.lm.n_layers))
    for i, prompt in enumerate(prompts):
        logits, _ = family.plainly(prompt.ids)
        right = logits[list(prompt.label_ids)].softmax(-1)
        torch.testing.assert_close(found.probabilities[i], right, rtol=1e-3, atol=1e-5)
    size = len(prompts[0].ids)
    ours = torch.stack([found.maps[layer][0, :size, :size] for layer in range(family.lm.n_layers)])
    assert apart(ours, family.maps(prompts[0])) < 1e-4


@pytest.mark.parametrize("name", SHARING)
def test_shared_demonstrations_are_whole_prompts(name, families, make_cell):
    family, prompts = families(name), [d.prompt for d in make_cell(examples=3).prompts]
    start = prompts[0].query
    found = answer(family.lm, encode(family.lm, prompts[0].ids[:start]), queries(prompts, start, "cpu"))
    steps = encode(family.lm, prompts[0].ids[9:start], encode(family.lm, prompts[0].ids[:9]))
    again = answer(family.lm, steps, queries(prompts, start, "cpu"))
    for i, prompt in enumerate(prompts):
        logits, _ = family.plainly(prompt.ids)
        assert apart(found[i], logits) < 1e-4
        assert apart(again[i], logits) < 1e-4


@pytest.mark.parametrize("name", sorted(set(SHARING) - {"sparse index handed on"}))
def test_isolation_is_a_mask_in_the_models_own_attention(name, families, make_cell):
    """The mask is given to the layer: an index, too, chooses among what it leaves, so that the label word sees itself."""
    family, cell = families(name), make_cell(examples=1)
    prompt = cell.prompts[0].prompt
    how = Isolation(layers=(family.lm.n_layers,), sides=("first",), positions=("label",))
    contexts = isolated_contexts(family.lm, cell, how)
    found = answer(family.lm, list(contexts.values())[1], queries([prompt], prompt.query, "cpu"))[0]
    pairs = [(p, i) for p in prompt.label_positions for i in range(p)]
    right, _ = family.plainly(prompt.ids, dict.fromkeys(range(family.lm.n_layers), pairs))
    assert apart(found, right) < 1e-4
    assert apart(right, family.plainly(prompt.ids)[0]) > 1e-4


@pytest.mark.parametrize("name", ["sparse index", "latent keys"])
def test_compression_is_the_whole_prompt_with_the_dropped_tokens_hidden(name, families, make_cell):
    family, prompt = families(name), make_cell(examples=1).prompts[0].prompt
    kept = anchor_tokens(prompt)
    small = compress(encode(family.lm, prompt.ids[: prompt.query]), kept, "original")
    found = answer(family.lm, small, queries([prompt], prompt.query, "cpu"))[0]
    dropped = [i for i in range(prompt.query) if i not in kept]
    pairs = [(q, i) for q in range(prompt.query, len(prompt.ids)) for i in dropped]
    right, _ = family.plainly(prompt.ids, dict.fromkeys(range(family.lm.n_layers), pairs))
    assert apart(found, right) < 1e-4


def test_an_index_of_blocks_cannot_be_compressed(families, make_cell):
    family, prompt = families("sparse index of blocks"), make_cell(examples=1).prompts[0].prompt
    with pytest.raises(AnchorsError, match="blocks of neighbouring keys"):
        compress(encode(family.lm, prompt.ids[: prompt.query]), anchor_tokens(prompt))


@pytest.mark.parametrize("name", ["equal scores", "kept keys"])
def test_keys_chosen_by_chance_run_in_whole_prompts_alone_and_are_not_shared(name, families, make_cell):
    """Many scores are equal (0 in an index of two heads; those of a token that comes again in Doge's first layer): the
    model itself reads other keys when tokens follow."""
    family, prompts = families(name), [d.prompt for d in make_cell(examples=3).prompts]
    ids = prompts[0].ids
    with torch.no_grad():
        alone, followed = (
            family.own(input_ids=torch.tensor([ids[:n]])).logits[0, :30] for n in (30, len(ids))
        )
    assert apart(alone, followed) > 1e-3
    found = flow(family.lm, prompts)
    for i, prompt in enumerate(prompts):
        right = family.plainly(prompt.ids)[0][list(prompt.label_ids)].softmax(-1)
        torch.testing.assert_close(found.probabilities[i], right, rtol=1e-3, atol=1e-5)
    with pytest.raises(AnchorsError, match="scores some alike at the edge of its top"):
        encode(family.lm, ids[:-5])
    assert not [m for m in family.lm.model.modules() if "forward" in vars(m)]


def test_a_state_beside_keys_and_values_goes_with_them(families, make_cell):
    family, prompts = families("state beside attention"), [d.prompt for d in make_cell(examples=2).prompts]
    start = prompts[0].query
    found = answer(family.lm, encode(family.lm, prompts[0].ids[:start]), queries(prompts, start, "cpu"))
    assert family.lm.carries
    for row, prompt in zip(found, prompts, strict=True):
        assert apart(row, family.plainly(prompt.ids)[0]) < 1e-4


def test_keys_that_are_no_tokens_are_refused(tokenizer, prompts):
    """At once where four tokens are enough to see it; else where compressed keys come in."""
    sizes = WIDE | SMALL | {
        "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "n_shared_experts": 1, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
        "sliding_window": 16, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    layers = ["compressed_sparse_attention", "heavily_compressed_attention", "heavily_compressed_attention"]
    with pytest.raises(RoutingError, match="they are not its tokens"):
        Family(hf.DeepseekV4Config(**sizes, layer_types=layers), tokenizer)
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}
    lm = Family(hf.DeepseekV4Config(**sizes, layer_types=layers[1:] * 2, compress_rates=rates), tokenizer).lm
    with pytest.raises(RoutingError, match="they are not its tokens"):
        flow(lm, prompts[:1])
    with pytest.raises(AnchorsError, match="caches more than keys and values"):
        encode(lm, prompts[0].ids)


def test_beta_has_the_heads_of_each_layer(families, make_cell):
    """Entries beyond a layer's heads stay 0, and the fast loss is the literal one; a file keeps the numbers of heads."""
    lm, cell = families("heads by layer").lm, make_cell(examples=1)
    prompt = cell.prompts[0].prompt
    assert lm.heads == (4, 8, 4)
    beta = new_beta(lm, prompt)
    with torch.no_grad():
        beta += torch.randn(beta.shape, generator=torch.Generator().manual_seed(0))
    before = encode(lm, prompt.ids[:-1])
    literal = literal_loss(lm, prompt, beta)
    literal.backward()
    assert not beta.grad[[0, 2], 4:].any()
    assert beta.grad[1].abs().amin() > 0
    with label_head(lm, prompt.label_ids):
        quick = one_token_loss(lm, before, prompt, beta)
    torch.testing.assert_close(quick, literal.detach(), rtol=1e-4, atol=1e-5)
    fitted = fit(lm, encode(lm, prompt.ids[: prompt.query]), [prompt], epochs=2)
    assert not fitted.beta[[0, 2], 4:].any()
    path = cell.folder / "beta.safetensors"
    fitted.save(path, {"model": "x"})
    again = Beta.load(path)
    again.demand(lm)
    assert again.heads == (4, 8, 4)
    with pytest.raises(AnchorsError, match=r"3 layers of 8 heads .* has 3 layers of 4 or 8 heads"):
        Beta(fitted.beta, fitted.classes).demand(lm)


@pytest.mark.parametrize("name", ["latent keys", "shared keys", "heads by layer"])
def test_the_diagnosis_reads_keys_of_the_attention(name, families, make_cell):
    lm = families(name).lm
    for layer in range(lm.n_layers):
        state = Diagnosis(components=(1,), layer=layer).prepare(lm, make_cell("agnews", 4))
        assert len(state) == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shared keys", "another way than the residual stream .per_layer_input"),
        ("several streams", "several residual streams"),
        ("sparse index handed on", "another way than the residual stream .prev_topk_indices"),
    ],
)
def test_patching_demands_one_residual_stream(name, said, families, make_cell):
    with pytest.raises(AnchorsError, match=said):
        Causal(layers=(2,)).prepare(families(name).lm, make_cell(examples=1))


def test_one_stream_is_enough_for_other_families(families, prompts):
    lm = families("latent keys").lm
    found = []
    for prompt in prompts[:2]:
        with streams(lm, range(3)) as entering:
            encode(lm, prompt.ids[:20])
        found.append(entering)
    demand_one_stream(lm, *found)
    assert apart(found[0][2].stream, found[1][2].stream) > 1e-2


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("attention chunks", "attention chunk: 16"),
        ("shared keys", "sliding window: 16"),
        ("sparse index", "sparse index .top-k.: 20"),
        ("kept keys", "kept keys .top-k.: 20"),
        ("latent keys", None),
    ],
)
def test_the_note_counts_label_words_without_attention(name, what, families, make_cell):
    """As many as have exactly zero attention from the target in some layer of the model's own."""
    family, prompts = families(name), [d.prompt for d in make_cell(examples=2).prompts]
    hidden, layers = 0, set()
    for prompt in prompts:
        _, matrices = family.plainly(prompt.ids)
        zero = torch.stack(
            [m[0, :, prompt.target, list(prompt.label_positions)].sum(0) == 0 for m in matrices]
        )
        hidden += int(zero.any(0).sum())
        layers |= set(zero.any(1).nonzero().flatten().tolist())
    note = hidden_labels(family.lm, prompts)
    if what is None:
        assert not hidden
        assert note is None
        return
    assert hidden
    assert note.startswith(f"{hidden} of 4 label words")
    assert f"in {len(layers)} of {family.lm.n_layers} layers" in note
    assert re.search(what, note)
