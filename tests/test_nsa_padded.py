"""A padded batch in a cache: the rows of each text alone, through the model without a cache.

Texts are unlike in length by no multiple of l, d or l'; one is a token long, one longer than all that a query reads.
"""

import copy

import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from test_nsa_cache import Counted, close, generated, model, step, text, twin
from torch import Tensor
from transformers import DynamicCache

from anchors.context import cache_argument
from anchors.errors import AnchorsError
from anchors.nsa.cache import ROOM, NSALayer
from anchors.nsa.config import ROPE
from anchors.nsa.geometry import Geometry
from anchors.nsa.texts import Texts

LENGTHS = (37, 5, 20, 1, 95, 12)


def batch(lengths=LENGTHS, seed=20) -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts, and the same in rows that are padded on the left with tokens like any other, and their mask."""
    rows = [text(n, seed=seed + i) for i, n in enumerate(lengths)]
    ids = text(max(lengths), batch=len(rows), seed=seed - 1)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.shape[1] :], mask[i, -row.shape[1] :] = row[0], 1
    return rows, ids, mask


def wider(mask: Tensor, tokens: int) -> Tensor:
    """The mask when so many tokens have followed."""
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)


def on(lm, ids, mask, cache):
    return lm(ids, attention_mask=mask, use_cache=True, **{cache_argument(lm): cache}).logits


def alone(lm, row: Tensor) -> Tensor:
    return lm(row, use_cache=False).logits


def seen(lm) -> list[Tensor]:
    """The logits of every pass from now on, before `generate` rounds them."""
    found = []
    lm.register_forward_hook(lambda module, given, made: found.append(made.logits[:, -1]))
    return found


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rope", ROPE)
@torch.no_grad()
def test_every_step_of_generate_is_that_of_the_text_alone(rope, kept):
    lm, (rows, ids, mask) = model(compressed_rope=rope), batch()
    logits = seen(lm)
    cache = {} if kept else {cache_argument(lm): twin()}
    found = generated(lm, ids, attention_mask=mask, max_new_tokens=60, **cache)
    logits = torch.stack(logits, 1)
    for i, row in enumerate(rows):
        whole = torch.cat([row, found[i : i + 1, ids.shape[1] :]], 1)
        wanted = alone(lm, whole)[:, row.shape[1] - 1 : -1]
        close(logits[i : i + 1], wanted)
        assert torch.equal(wanted.argmax(-1), whole[:, row.shape[1] :])


@pytest.mark.parametrize("beams", [2, 5])
@torch.no_grad()
def test_beams(beams):
    lm, (rows, ids, mask) = model(compressed_rope="block_start"), batch()
    options = {"max_new_tokens": 40, "num_beams": beams, "num_return_sequences": 2}
    found = generated(lm, ids, attention_mask=mask, **options)[:, ids.shape[1] :].unflatten(0, (-1, 2))
    for row, its in zip(rows, found, strict=True):
        assert torch.equal(its, generated(lm, row, use_cache=False, **options)[:, row.shape[1] :])


@pytest.mark.parametrize(
    "sizes", [(40,) + (1,) * 90, (95, ROOM + 40, 1, 1, 60), (7, 1, 40, 4, 4, 1, 60), (3, 91, 2, 50)]
)
@torch.no_grad()
def test_pieces_of_any_length(sizes):
    """Where a prompt comes in pieces, the first may be padding throughout for some."""
    lm, (rows, ids, mask) = model(), batch()
    total, cache, found, past = sum(sizes), DynamicCache(), [], 0
    more = text(total, batch=len(ids), seed=3)[:, ids.shape[1] :]
    ids, mask = torch.cat([ids, more], 1), wider(mask, more.shape[1])
    for piece in ids.split(sizes, dim=1):
        past += piece.shape[1]
        found.append(on(lm, piece, mask[:, :past], cache))
    found = torch.cat(found, 1)
    for i, row in enumerate(rows):
        wanted = alone(lm, torch.cat([row, more[i : i + 1]], 1))
        close(found[i : i + 1, -wanted.shape[1] :], wanted)
    assert all(type(layer) is NSALayer for layer in cache.layers)


@torch.no_grad()
def test_a_step_makes_the_rows_that_may_be_new():
    lm, (_, ids, mask) = model(), batch()
    cache, counted, geometry = DynamicCache(), Counted(lm), lm.config.geometry
    on(lm, ids, mask, cache)
    assert counted.blocks == 2 * geometry.compressed(95)
    for t in range(1, 41):
        before = counted.blocks
        on(lm, text(1, batch=len(ids), seed=t), wider(mask, t), cache)
        new = geometry.compressed(95 + t) - geometry.compressed(94 + t)
        assert counted.blocks - before == 2 * (geometry.l // geometry.d + new)


@pytest.mark.parametrize(("l", "d"), [(8, 4), (4, 4), (6, 2), (3, 1), (12, 3)])
def test_padding_leaves_no_more_than_the_last_rows_unused(l, d):
    geometry = Geometry(l=l, d=d, lp=l, n=3, w=4)
    for tokens in range(1, 61):
        mask = torch.ones(tokens, tokens).triu()  # 0 to T − 1 tokens of padding
        layout = Texts.of_mask(mask).laid(geometry)
        used = (layout.place < tokens).sum(1)
        assert int(used.min()) >= geometry.compressed(tokens) - l // d
        # A row is where it was when there were fewer tokens.
        if tokens > 1:
            fewer = Texts.of_mask(mask[:-1, :-1]).laid(geometry).place
            there = fewer < tokens - 1
            assert torch.equal(layout.place[:-1, : fewer.shape[1]][there], fewer[there])


@pytest.mark.parametrize("removed", [1, 2, 3, 4, 5, 11, 12, 13, 49])
@torch.no_grad()
def test_cropping(removed):
    lm, (rows, ids, mask) = model(), batch()
    more, other = text(60, batch=len(ids), seed=3), text(removed + 30, batch=len(ids), seed=9)
    cache = DynamicCache()
    on(lm, ids, mask, cache)
    on(lm, more, wider(mask, 60), cache)
    cache.crop(-removed)
    kept = 60 - removed
    found = torch.cat(
        [on(lm, other[:, t : t + 1], wider(mask, kept + t + 1), cache) for t in range(other.shape[1])], 1
    )
    for i, row in enumerate(rows):
        whole = torch.cat([row, more[i : i + 1, :kept], other[i : i + 1]], 1)
        close(found[i : i + 1], alone(lm, whole)[:, -other.shape[1] :])


@pytest.mark.parametrize("how", ["assistant", "prompt"])
@torch.no_grad()
def test_assisted_decoding_of_a_padded_text(how):
    """transformers helps one text at a time, which may be padded all the same."""
    lm, helper, row = model(), model(n=5), text(6).repeat(1, 5)
    for weight in helper.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    helped = {"assistant_model": helper} if how == "assistant" else {"prompt_lookup_num_tokens": 7}
    ids = torch.cat([torch.zeros(1, 11, dtype=torch.long), row], 1)
    common = {"max_new_tokens": 50, "suppress_tokens": [0]}
    found = generated(lm, ids, attention_mask=(torch.arange(41) >= 11)[None].long(), **common, **helped)
    assert torch.equal(found[:, 11:], generated(lm, row, use_cache=False, **common))


@torch.no_grad()
def test_examples_are_repeated_chosen_and_put_in_order():
    lm, (rows, ids, mask) = model(), batch((41, 30, 7))
    for change, order in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 2, 0, 1])), [1, 2, 0, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([2])), [2]),
        (lambda c: c.batch_select_indices(torch.tensor([0])), [0]),  # without padding from then on
    ):
        cache, more = DynamicCache(), text(25, batch=len(order), seed=5)
        on(lm, ids, mask, cache)
        change(cache)
        its = mask[order]
        found = torch.cat([on(lm, more[:, t : t + 1], wider(its, t + 1), cache) for t in range(25)], 1)
        for i, old in enumerate(order):
            whole = torch.cat([rows[old], more[i : i + 1]], 1)
            close(found[i : i + 1], alone(lm, whole)[:, -25:])


@torch.no_grad()
def test_places_are_those_in_the_text():
    """As transformers counts them from the mask, and as the model does where nobody says."""
    lm, (rows, ids, mask) = model(), batch()
    layer, places = lm.model.layers[0].self_attn, []
    layer.register_forward_pre_hook(
        lambda module, args, given: places.append(given["position_ids"]), with_kwargs=True
    )
    generated(lm, ids, attention_mask=mask, max_new_tokens=5)
    cache = DynamicCache()
    on(lm, ids, mask, cache)
    for t in range(1, 5):
        on(lm, text(1, batch=len(ids)), wider(mask, t), cache)
    for found in (places[:5], places[5:]):
        for i, row in enumerate(rows):
            own = torch.cat([x[i] for x in found])[ids.shape[1] - row.shape[1] :]
            assert own.tolist() == list(range(row.shape[1] + 4))


@torch.no_grad()
def test_a_cache_that_the_model_made_is_continued_with_the_mask():
    lm, (rows, ids, mask) = model(), batch()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": places}):
        cache = lm(ids, attention_mask=mask, use_cache=True, **given)["past_key_values"]
        found = on(lm, ids[:, :9], wider(mask, 9), cache)
        for i, row in enumerate(rows):
            close(found[i : i + 1], alone(lm, torch.cat([row, ids[i : i + 1, :9]], 1))[:, -9:])


@torch.no_grad()
def test_a_second_generate_goes_on():
    lm, (rows, ids, mask) = model(), batch()
    cache = {cache_argument(lm): DynamicCache()}
    found = generated(lm, ids, attention_mask=mask, max_new_tokens=20, **cache)
    found = generated(lm, found, attention_mask=wider(mask, 20), max_new_tokens=25, **cache)[
        :, ids.shape[1] :
    ]
    for row, its in zip(rows, found, strict=True):
        assert torch.equal(its, generated(lm, row, use_cache=False, max_new_tokens=45)[0, row.shape[1] :])


@torch.no_grad()
def test_a_layer_alone():
    layer, (_, _, mask) = model().model.layers[0].self_attn, batch()
    x, cache = torch.randn(len(mask), 110, 24, dtype=torch.float64), DynamicCache()
    pieces = ((0, 95), *((t, t + 1) for t in range(95, 110)))
    found = [layer(x[:, a:b], attention_mask=wider(mask, b - 95), cache=cache)[0] for a, b in pieces]
    found = torch.cat(found, 1)
    for i, n in enumerate(LENGTHS):
        close(found[i : i + 1, 95 - n :], layer(x[i : i + 1, 95 - n :])[0])


def test_gradients_flow_through_it():
    lm, (rows, ids, mask) = model(), batch((37, 5, 20))
    more, cache = text(30, batch=3, seed=3), DynamicCache()
    for i, row in enumerate(rows):
        alone(lm, torch.cat([row, more[i : i + 1]], 1))[:, -1].logsumexp(-1).sum().backward()
    wanted = {name: x.grad.clone() for name, x in lm.named_parameters()}
    lm.zero_grad()
    on(lm, ids, mask, cache)
    on(lm, more, wider(mask, 30), cache)[:, -1].logsumexp(-1).sum().backward()
    for name, x in lm.named_parameters():
        torch.testing.assert_close(x.grad, wanted[name], rtol=1e-8, atol=1e-12)


def by_the_kernels(device: str, lengths, steps: int, allowed: float) -> None:
    """Steps in float32, against the equations of each text in float64."""
    lm, (rows, ids, mask) = model(torch.float32, backend="triton").to(device), batch(lengths)
    exact = copy.deepcopy(lm).double().cpu()
    exact.config.backend = "reference"
    logits = seen(lm)
    found = generated(lm, ids.to(device), attention_mask=mask.to(device), max_new_tokens=steps).cpu()
    logits = torch.stack(logits, 1).double().cpu()
    for i, row in enumerate(rows):
        wanted = alone(exact, torch.cat([row, found[i : i + 1, ids.shape[1] :]], 1))[:, row.shape[1] - 1 : -1]
        assert float((logits[i : i + 1] - wanted).abs().max() / wanted.abs().max()) <= allowed


@needs_triton
@needs_interpreter
@torch.no_grad()
def test_steps_of_the_kernels_interpreted():
    by_the_kernels("cpu", (50, 1, 18), 5, 1e-5)


@needs_triton
@needs_cuda
@torch.no_grad()
def test_steps_of_the_kernels_on_cuda():
    by_the_kernels("cuda", LENGTHS, 60, 1e-4)


@needs_triton
@needs_cuda
@torch.no_grad()
def test_another_mask_on_cuda_gives_no_numbers():
    """Of the example whose padding changed, without a look at it."""
    lm, (_, ids, mask) = model(torch.float32, backend="triton").cuda(), batch()
    ids, mask, cache = ids.cuda(), mask.cuda(), DynamicCache()
    on(lm, ids, mask, cache)
    other = wider(mask, 1)
    other[1, 3:] = 1
    assert on(lm, ids[:, :1], other, cache).isnan().all(-1)[:, 0].tolist() == [
        i == 1 for i in range(len(ids))
    ]


@needs_triton
@needs_cuda
@torch.no_grad()
def test_a_step_of_a_layer_does_not_wait_for_the_device():
    layer, (_, _, mask) = model(torch.float32, backend="triton").cuda().model.layers[0].self_attn, batch()
    mask, x, cache = mask.cuda(), torch.randn(len(mask), 110, 24, device="cuda"), DynamicCache()
    layer(x[:, :95], texts=Texts.of_mask(mask), cache=cache)
    for t in range(95, 110):
        texts = Texts.of_mask(wider(mask, t - 94))
        torch.cuda.set_sync_debug_mode("default" if t < 102 else "error")  # compiled first
        try:
            layer(x[:, t : t + 1], texts=texts, cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_other_padding_than_on_the_left_is_refused():
    lm, (_, ids, mask) = model(), batch()
    holes = wider(mask, 0)
    holes[0, -4] = 0
    for wrong, said in ((mask.flip(1), "padded on the right"), (holes, "within a text")):
        with pytest.raises(AnchorsError, match=said) as error:
            generated(lm, ids, attention_mask=wrong, max_new_tokens=1)
        assert error.value.code == "shape"
    with pytest.raises(AnchorsError, match="padded on the right"):
        lm.model.layers[0].self_attn(
            torch.zeros(*ids.shape, 24, dtype=torch.float64),
            attention_mask=mask.flip(1),
            cache=DynamicCache(),
        )


@torch.no_grad()
def test_texts_packed_by_their_positions_are_refused_by_a_cache():
    """Not those of padding, which transformers fills in as it likes."""
    lm, (rows, ids, mask) = model(), batch()
    anew = torch.cat([torch.arange(40), torch.arange(55)]).expand(len(ids), -1)
    for given in ({}, {"attention_mask": torch.ones_like(ids)}, {"attention_mask": mask}):
        with pytest.raises(AnchorsError, match="begin anew came with a cache"):
            lm(ids, position_ids=anew, use_cache=True, **given, **{cache_argument(lm): DynamicCache()})
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    cache = {cache_argument(lm): DynamicCache()}
    found = lm(ids, attention_mask=mask, position_ids=places, use_cache=True, **cache).logits
    for i, row in enumerate(rows):
        close(found[i : i + 1, -row.shape[1] :], alone(lm, row))


@torch.no_grad()
def test_a_cache_is_continued_as_it_was_filled():
    lm, (_, ids, mask) = model(), batch()
    more = ids[:, :1]

    def filled(mask):
        cache = DynamicCache()
        on(lm, ids, mask, cache)
        return cache

    other = wider(mask, 1)
    other[1, 3:] = 1
    for cache, given in (
        (filled(mask), other),
        (filled(mask), torch.ones_like(other)),
        (filled(torch.ones_like(mask)), wider(mask, 1)),
        (filled(mask), wider(mask, 1).flip(0)),
    ):
        with pytest.raises(AnchorsError, match="otherwise than it was filled"):
            on(lm, more, given, cache)
    with pytest.raises(AnchorsError, match="otherwise than it was filled"):
        step(lm, more, filled(mask))
    with pytest.raises(AnchorsError, match="A mask of 95 tokens came with 96"):
        on(lm, more, mask, filled(mask))
    # Examples went, and transformers' own layer does not tell which.
    cache = twin()
    on(lm, ids, mask, cache)
    cache.batch_select_indices(torch.tensor([0, 1]))
    with pytest.raises(AnchorsError, match="otherwise than it was filled"):
        on(lm, more[:2], wider(mask[:2], 1), cache)
