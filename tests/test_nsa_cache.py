"""What `generate` keeps of NSA layers: the rows of one pass, whatever happens to the cache in between."""

import copy

import pytest
import torch
from test_nsa_model import model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from anchors.context import cache_argument
from anchors.errors import AnchorsError
from anchors.nsa.cache import ROOM, NSALayer
from anchors.nsa.config import ROPE
from anchors.nsa.texts import Texts


class Anew(DynamicLayer):
    """The literal twin: every compressed key made anew at every step."""


def twin(layers=2):
    cache = DynamicCache()
    cache.layers = [Anew() for _ in range(layers)]
    return cache


def text(tokens, batch=1, seed=2):
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def step(lm, ids, cache):
    return lm(ids, use_cache=True, **{cache_argument(lm): cache}).logits


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def generated(lm, ids, **options):
    common = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    return lm.generate(ids, **(common | options))


class Counted:
    """How many blocks φ made."""

    def __init__(self, lm):
        self.blocks = 0
        for layer in lm.model.layers:
            layer.self_attn.phi_k.register_forward_hook(self.count)

    def count(self, module, given, made):
        self.blocks += made.shape[1]


@pytest.mark.parametrize("rope", ROPE)
@torch.no_grad()
def test_two_hundred_steps_make_every_block_once(rope):
    lm, ids = model(compressed_rope=rope), text(215, batch=2)
    whole = lm(ids).logits
    counted, cache = Counted(lm), DynamicCache()
    close(step(lm, ids[:, :15], cache), whole[:, :15])
    for t in range(15, 215):
        close(step(lm, ids[:, t : t + 1], cache)[:, 0], whole[:, t])
    assert counted.blocks == 2 * lm.config.geometry.compressed(215)
    assert all(type(layer) is NSALayer for layer in cache.layers)


@torch.no_grad()
def test_the_twin_makes_all_of_them_anew():
    lm, ids = model(), text(90)
    whole, counted, cache = lm(ids).logits, Counted(lm), twin()
    for t in range(90):
        close(step(lm, ids[:, t : t + 1], cache)[:, 0], whole[:, t])
    assert counted.blocks == 2 * sum(lm.config.geometry.compressed(t + 1) for t in range(90))
    assert all(type(layer) is Anew for layer in cache.layers)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (7, 1, 40, 4, 4, 1, 30), (3, ROOM + 40, 1, 1, 60)]
)
@torch.no_grad()
def test_pieces_of_any_length(sizes):
    lm, ids, cache = model(), text(sum(sizes)), DynamicCache()
    whole = lm(ids).logits
    found = [step(lm, piece, cache) for piece in ids.split(sizes, dim=1)]
    close(torch.cat(found, 1), whole)


@torch.no_grad()
def test_generate_uses_it_and_finds_what_it_finds_without_a_cache():
    lm, ids = model(), text(20, batch=3)
    found = generated(lm, ids, max_new_tokens=60, return_dict_in_generate=True)
    cache = found.cache if "cache" in found else found.past_key_values
    assert [type(layer) for layer in cache.layers] == [NSALayer, NSALayer]
    assert cache.layers[0].kc.shape[2] == lm.config.geometry.compressed(79)
    assert torch.equal(found.sequences, generated(lm, ids, max_new_tokens=60, use_cache=False))


@pytest.mark.parametrize("beams", [2, 5])
@torch.no_grad()
def test_beams(beams):
    lm, ids = model(), text(18, batch=2)
    options = {"max_new_tokens": 40, "num_beams": beams, "num_return_sequences": 2}
    found = generated(lm, ids, **options)
    assert torch.equal(found, generated(lm, ids, use_cache=False, **options))
    assert torch.equal(found, generated(lm, ids, **options, **{cache_argument(lm): twin()}))


@pytest.mark.parametrize("how", ["assistant", "prompt"])
@torch.no_grad()
def test_decoding_that_takes_tokens_back(how):
    """Assisted decoding crops what the model does not accept."""
    lm, ids = model(), text(6).repeat(1, 5)
    helper = model(n=5)
    with torch.no_grad():
        for weight in helper.parameters():
            weight += 0.02 * torch.randn_like(weight)
    helped = {"assistant_model": helper} if how == "assistant" else {"prompt_lookup_num_tokens": 7}
    # An assistant takes the token of padding for padding, wherever the model itself wrote it.
    common = {"max_new_tokens": 50, "suppress_tokens": [0]}
    assert torch.equal(generated(lm, ids, **common, **helped), generated(lm, ids, **common, use_cache=False))


@pytest.mark.parametrize("removed", [1, 2, 3, 4, 5, 11, 12, 13, 49])
@torch.no_grad()
def test_cropping_cuts_blocks_too(removed):
    """The blocks that lost a token are made of the tokens that come in their place."""
    lm, ids = model(), text(50)
    cache, other = DynamicCache(), text(removed + 30, seed=9)
    step(lm, ids, cache)
    cache.crop(-removed)
    geometry, layer = lm.config.geometry, cache.layers[0]
    assert layer.kc.shape[2] == geometry.compressed(50 - removed)
    counted = Counted(lm)
    found = step(lm, other, cache)
    assert counted.blocks == 2 * (geometry.compressed(80) - geometry.compressed(50 - removed))
    close(found, lm(torch.cat([ids[:, :-removed], other], 1)).logits[:, 50 - removed :])


@torch.no_grad()
def test_examples_are_repeated_chosen_and_put_in_order():
    lm, ids, more = model(), text(41, batch=2), text(25, batch=4, seed=5)
    for change, rows in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0, 1])), [1, 1, 0, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache, counted = DynamicCache(), Counted(lm)
        step(lm, ids, cache)
        change(cache)
        before = counted.blocks
        found = torch.cat([step(lm, more[: len(rows), t : t + 1], cache) for t in range(25)], 1)
        assert counted.blocks - before == 2 * (
            lm.config.geometry.compressed(66) - lm.config.geometry.compressed(41)
        )
        close(found, lm(torch.cat([ids[rows], more[: len(rows)]], 1)).logits[:, 41:])


@torch.no_grad()
def test_places_go_with_their_examples():
    """Where two texts stand at other places, beams take the places along."""
    lm, ids, more = model(), text(30, batch=2), text(14, batch=2, seed=5)
    places = torch.arange(44)[None] + torch.tensor([[0], [100]])
    name, whole = cache_argument(lm), torch.cat([ids[[1, 0]], more], 1)
    cache = DynamicCache()
    lm(ids, position_ids=places[:, :30], use_cache=True, **{name: cache})
    cache.reorder_cache(torch.tensor([1, 0]))
    found = lm(more, position_ids=places[[1, 0], 30:], use_cache=True, **{name: cache}).logits
    close(found, lm(whole, position_ids=places[[1, 0]]).logits[:, 30:])


@torch.no_grad()
def test_keys_from_elsewhere_are_compressed_anew():
    """Whoever puts other keys in a layer's place has nothing of the old ones left."""
    lm, ids, other, last = model(), text(40), text(40, seed=3), text(3, seed=4)
    cache, foreign = DynamicCache(), DynamicCache()
    step(lm, ids, cache)
    step(lm, other, foreign)
    for mine, its in zip(cache.layers, foreign.layers, strict=True):
        mine.keys, mine.values = its.keys, its.values
    close(step(lm, last, cache), lm(torch.cat([other, last], 1)).logits[:, 40:])
    close(step(lm, last, foreign), lm(torch.cat([other, last], 1)).logits[:, 40:])


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
@torch.no_grad()
def test_copies_do_not_write_into_each_other(copied):
    lm, ids, ends = model(), text(40), text(20, batch=2, seed=7)
    cache, twin_of = DynamicCache(), DynamicCache()
    step(lm, ids, cache)
    twin_of.layers = [copied(layer) for layer in cache.layers]
    for t in range(20):
        for row, own in enumerate((cache, twin_of)):
            found = step(lm, ends[row : row + 1, t : t + 1], own)
            close(found[:, 0], lm(torch.cat([ids, ends[row : row + 1, : t + 1]], 1)).logits[:, -1])


def test_what_inference_mode_left_can_be_gone_on_with():
    lm, ids, cache = model(), text(60), DynamicCache()
    with torch.inference_mode():
        step(lm, ids[:, :40], cache)
        step(lm, ids[:, 40:41], cache)
    with torch.no_grad():
        found = torch.cat([step(lm, ids[:, t : t + 1], cache) for t in range(41, 60)], 1)
        close(found, lm(ids).logits[:, 41:])


def test_gradients_flow_through_it():
    """Two pieces with a cache between have the gradient of one pass."""
    lm, ids, cache = model(), text(60), DynamicCache()
    lm(ids).logits[:, -1].logsumexp(-1).sum().backward()
    wanted = {name: x.grad.clone() for name, x in lm.named_parameters()}
    lm.zero_grad()
    step(lm, ids[:, :33], cache)
    step(lm, ids[:, 33:], cache)[:, -1].logsumexp(-1).sum().backward()
    for name, x in lm.named_parameters():
        torch.testing.assert_close(x.grad, wanted[name], rtol=1e-8, atol=1e-12)


@torch.no_grad()
def test_another_phi_or_other_blocks_are_made_anew():
    lm, ids = model(phi="mean"), text(50)
    other = model(phi="mean", l=4, d=4)
    cache = DynamicCache()
    step(lm, ids[:, :40], cache)
    whole = DynamicCache()
    step(other, ids[:, :40], whole)
    # The same keys in the first layer; deeper ones differ, so they are given over.
    for mine, its in zip(cache.layers, whole.layers, strict=True):
        mine.keys.copy_(its.keys)
        mine.values.copy_(its.values)
    close(step(other, ids[:, 40:], cache), other(ids).logits[:, 40:])


@torch.no_grad()
def test_several_texts_in_a_cache_are_not_gone_on_with():
    """Not in one that makes its layers as they are used, either."""
    layer, x = model().model.layers[0].self_attn, torch.randn(1, 40, 24, dtype=torch.float64)
    for cache in (DynamicCache(), twin()):
        layer(x, texts=Texts.of_bounds(torch.tensor([0, 15, 40]), 40), cache=cache)
        with pytest.raises(AnchorsError, match="to be continued"):
            layer(x[:, :1], cache=cache)


@torch.no_grad()
def test_reset_begins_again():
    lm, ids, cache = model(), text(40), DynamicCache()
    step(lm, text(50, seed=8), cache)
    cache.layers[0].reset(), cache.layers[1].reset()
    if cache.get_seq_length():  # what transformers empties, it does not always forget
        pytest.skip("this transformers keeps the length of a cache that is reset")
    close(step(lm, ids, cache), lm(ids).logits)


@torch.no_grad()
def test_it_grows_without_copies():
    """Beyond its first room a buffer lasts for many steps."""
    lm, cache = model(), DynamicCache()
    step(lm, text(20), cache)
    layer = cache.layers[0]
    first = layer.keys.data_ptr()
    for t in range(30):
        step(lm, text(1, seed=t), cache)
    assert layer.keys.data_ptr() == first
    assert layer.get_seq_length() == 50
