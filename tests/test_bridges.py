"""Families with attention in a method of their own: through the seam they are what they were, and so are all sums."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from common import apart
from families import BRIDGED, CONFIGS, make
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from sweep import right

from anchors.analyses.isolation import Isolation, isolated_contexts
from anchors.attention.bridges import BRIDGES, bridge, release
from anchors.attention.seam import attend, seam
from anchors.attention.streaming import TILE_BYTES
from anchors.context import answer, encode, queries
from anchors.errors import AnchorsError, RoutingError
from anchors.flow import flow
from anchors.model.language import load

CACHING = ("bloom", "falcon_new", "gpt_neo", "mpt", "roformer")


class Family:
    """A model on the seam, and the same as transformers made it, on its own eager attention."""

    def __init__(self, name, tokenizer):
        self.own = make(name, len(tokenizer))
        if name == "gpt_neo":  # it divides no score by √d: at the others' size a softmax of it has one entry
            for block in self.own.transformer.h:
                block.attn.attention.q_proj.weight.data /= 3
        self.lm = load(copy.deepcopy(self.own), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def families(tokenizer):
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, Family(name, tokenizer))


def asked(prompt):
    """A prompt as the side knows it that uses nothing of the toolkit."""
    return right.Asked(
        prompt.ids, prompt.label_positions, prompt.label_classes, prompt.label_ids, prompt.gold, prompt.query, ()
    )  # fmt: skip


def test_every_bridge_has_a_family():
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(CONFIGS.get(n) or BRIDGED[n]) for n in [*BRIDGED, "gptj"]]
    kinds = {
        f"{type(module).__module__.split('.')[2]}.{type(module).__qualname__}"
        for model in models
        for module in model.modules()
        if type(module).__module__.startswith("transformers.models.")
    }
    assert not set(BRIDGES) - kinds


@pytest.mark.parametrize("name", sorted(BRIDGED))
def test_padded_answers_and_maps_are_the_models_own(name, families, prompts):
    """Against the softmax of its own eager attention under autograd; two prompts of different lengths in a batch."""
    family, pair = families(name), prompts[:2]
    assert len(pair[0].ids) != len(pair[1].ids)
    found = flow(family.lm, pair, maps=range(family.lm.n_layers))
    own = copy.deepcopy(family.own).requires_grad_(True)
    for i, prompt in enumerate(pair):
        wanted = right.labels_of(right.runs(own, prompt.ids)[0], asked(prompt)).softmax(-1)
        torch.testing.assert_close(found.probabilities[i], wanted.detach(), rtol=1e-3, atol=1e-5)
        size = len(prompt.ids)
        ours = torch.stack([found.maps[layer][i, :size, :size] for layer in range(family.lm.n_layers)])
        wanted = right.maps(own, asked(prompt))
        assert (wanted > 1e-6).sum() > size
        assert apart(ours, wanted) < 1e-4


@pytest.mark.parametrize("name", CACHING)
def test_shared_demonstrations_and_isolation_are_whole_prompts(name, families, make_cell):
    family, cell = families(name), make_cell(examples=3)
    shown = [d.prompt for d in cell.prompts]
    start = shown[0].query
    batch = queries(shown, start, "cpu")
    found = answer(family.lm, encode(family.lm, shown[0].ids[:start]), batch)
    for i, prompt in enumerate(shown):
        assert apart(found[i], right.runs(family.own, prompt.ids)[0][-1].detach()) < 1e-4
    how = Isolation(layers=(1,), sides=("first",), positions=("label",))
    context = list(isolated_contexts(family.lm, cell, how).values())[1]
    found = answer(family.lm, context, batch).gather(1, batch.label_ids).log_softmax(-1)
    wanted = right.isolated(family.own, [asked(p) for p in shown], range(1)).log()
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert (wanted - right.answers(family.own, [asked(p) for p in shown]).log()).abs().max() > 2e-3


def test_a_bias_on_keys_is_small_and_not_kept_by_layer(families, prompts):
    """No score of it is held: what reaches the seam grows with the tokens, whatever the tiles."""
    seen = []

    class Look:
        layers = frozenset([0, 1])

        def see(self, call):
            seen.append((call.key_bias, call.mask, call.fusable))

    lm = families("bloom").lm
    with seam(lm.modules, probes=[Look()]), torch.no_grad():
        lm.model(torch.tensor([prompts[0].ids]))
    for bias, mask, fusable in seen:
        assert bias.shape == (1, 6, len(prompts[0].ids))
        assert mask is None
        assert not fusable
    assert len(seen) == 2


def test_tiles_of_any_size_give_the_same(families, prompts, monkeypatch):
    lm = families("mpt").lm
    whole = flow(lm, prompts[:2]).sums
    monkeypatch.setitem(TILE_BYTES, "cpu", 1 << 14)
    small = flow(lm, prompts[:2]).sums
    for name in ("s_wp", "s_pq", "s_ww"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "what"), [("bloom", "takes no position_ids"), ("mpt", "takes no position_ids")]
)
def test_what_follows_a_cut_context_would_stand_elsewhere(name, what, families, prompts):
    lm, prompt = families(name).lm, prompts[0]
    cut = encode(lm, prompt.ids[: prompt.query]).keep(prompt.label_positions, prompt.query)
    with pytest.raises(AnchorsError, match=what):
        answer(lm, cut, queries([prompt], prompt.query, "cpu"))


def test_the_first_gpt_keeps_no_cache(families, prompts):
    with pytest.raises(AnchorsError, match="holds no keys"):
        encode(families("openai").lm, prompts[0].ids)


def test_mpt_says_how_long_a_prompt_may_be(families):
    assert families("mpt").lm.context == 512


def test_falcon_with_alibi_is_two_models(tokenizer):
    """transformers adds its bias twice in eager attention, and once in sdpa's."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    ids, said = torch.arange(2, 40)[None], {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = FalconConfig(**settings, alibi=True, initializer_range=0.3)
        config._attn_implementation = attention
        model = FalconForCausalLM(config).eval()
        with torch.no_grad():
            said[attention] = model(ids).logits
    assert apart(said["eager"], said["sdpa"]) > 1e-3
    with pytest.raises(RoutingError, match="adds the bias twice"):
        load(model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("name", ["codegen", "bloom"])
def test_a_bridge_is_taken_back(name, prompts):
    model, reached = make(name, 2000), []
    ids = torch.tensor([prompts[0].ids])

    def attend(module, query, key, value, *args, **kwargs):
        reached.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    with torch.no_grad():
        before = model(ids).logits
        assert bridge(model, attend, "eager")
        assert apart(model(ids).logits, before) > 0.01
        assert len(reached) == 2
        assert release(model)
        assert torch.equal(model(ids).logits, before)
    assert not bridge(make("gpt2", 20), attend, "eager")


def test_hooks_that_fetch_weights_stay(prompts, tokenizer):
    """accelerate wraps `forward`: a bridge stands inside the wrapper, and leaves it when it goes."""
    model, ids = make("falcon", len(tokenizer)), torch.tensor([prompts[0].ids])
    attention = model.transformer.h[0].self_attention
    with torch.no_grad():
        before = model(ids).logits
        add_hook_to_module(attention, AlignDevicesHook())
        wrapped = attention.forward
        lm = load(model, tokenizer=tokenizer, device="cpu")
        assert attention.forward is wrapped
        assert apart(lm.logits(ids), before) < 1e-5
        assert release(model)
        assert apart(model(ids).logits, before) < 1e-5
    assert attention.forward is wrapped


def test_a_soft_cap_beside_a_bias_is_not_understood():
    """The slope of the cap would be read off biased scores."""
    x, bias = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(RoutingError, match="biases them, too"):
        attend(torch.nn.Identity(), x, x, x, None, softcap=2.0, key_bias=bias)


def test_no_family_stands_in_both_tables():
    assert not set(BRIDGED) & set(CONFIGS)
