"""Every tensor of a language model maps to exactly one of the tower, on disk, in memory and as published, or none does."""

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from injection_families import FAMILIES, ROWS, TOKENS, VLM_ROWS, models, saved, shapes, tokenizer
from injection_families import NAMES as ALL
from safetensors.torch import load_file

from anchors.errors import AnchorsError
from anchors.injection.merging.embeddings import POLICIES, align
from anchors.injection.merging.mapping import Tower, agree, tower

PUBLISHED = {
    # Prefixes of towers and heads in checkpoints of the hub, some by several generations of one library.
    "llava": [("language_model.model.", "language_model.lm_head."), ("model.", "lm_head.")],
    "llava_next": [("language_model.model.", "language_model.lm_head.")],
    "idefics3": [("model.text_model.", "lm_head.")],
    "smolvlm": [("model.text_model.", "lm_head.")],
    "qwen2_vl": [("model.", "lm_head."), ("model.language_model.", "lm_head.")],
    "qwen2_5_vl": [("model.", "lm_head."), ("model.language_model.", "lm_head.")],
    "gemma3": [("language_model.model.", "language_model.lm_head.")],
    "qwen3_vl": [("model.language_model.", "lm_head.")],
    "internvl": [("language_model.model.", "language_model.lm_head.")],
    "llava_onevision": [("language_model.model.", "language_model.lm_head."), ("model.", "lm_head.")],
    "mistral3": [("language_model.model.", "language_model.lm_head.")],
}

NAMES = tuple(name for name in ALL if name != "qwen3_vl_moe")
"""Towers that hold tensor by tensor what their language models do; of stacked experts see test_injection_stacks."""


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def on_disk(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    paths = saved(family)
    return load_file(paths.vlm / "model.safetensors"), load_file(paths.base / "model.safetensors")


def in_memory(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    own = models(family)
    return own.vlm.state_dict(), own.base.state_dict()


def parameters(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tied weights once."""
    own = models(family)
    return dict(own.vlm.named_parameters()), dict(own.base.named_parameters())


def mapped(vlm: dict[str, torch.Tensor], llm: dict[str, torch.Tensor]) -> Tower:
    return tower(shapes(vlm), shapes(llm))


@pytest.mark.parametrize("source", [on_disk, in_memory, parameters])
def test_every_tensor_maps_to_the_one_that_came_from_it(family, source):
    vlm, llm = source(family)
    found = mapped(vlm, llm)
    spec = FAMILIES[family]
    names = {pair.llm for pair in found.pairs}
    assert names == set(llm)
    assert len({pair.vlm for pair in found.pairs}) == len(found.pairs)
    assert {pair.vlm for pair in found.pairs} | set(found.kept) == set(vlm)
    for pair in found.pairs:
        # The tower was made from the base by other means: base plus a little.
        own, theirs = llm[pair.llm], vlm[pair.vlm]
        cosine = torch.cosine_similarity(own.flatten(), theirs[: len(own)].flatten(), dim=0)
        assert cosine > 0.9, pair
    assert not any("vision" in pair.vlm or "visual" in pair.vlm for pair in found.pairs)
    assert sum(pair.kind == "layer" for pair in found.pairs) % spec.language.num_hidden_layers == 0
    assert {pair.layer for pair in found.pairs} == {None, *range(spec.language.num_hidden_layers)}
    assert [pair.kind for pair in found.pairs].count("embedding") == 1
    assert [pair.kind for pair in found.pairs].count("norm") == 1


def test_disk_and_memory_agree_on_canonical_names(family):
    disk, memory = mapped(*on_disk(family)), mapped(*parameters(family))
    assert [(p.canonical, p.layer, p.kind) for p in disk.pairs] == [
        (p.canonical, p.layer, p.kind) for p in memory.pairs
    ]
    canonical = {p.canonical for p in disk.pairs}
    assert {"model.embed_tokens.weight", "model.norm.weight"} < canonical
    assert "model.layers.2.self_attn.q_proj.weight" in canonical
    assert ("lm_head.weight" in canonical) == (not FAMILIES[family].tied)


def published(family: str, body: str, head: str) -> dict[str, torch.Tensor]:
    """The same tensors under the names of a published checkpoint."""
    vlm, llm = on_disk(family)
    found = mapped(vlm, llm)
    renamed = {name: vlm[name] for name in found.kept}
    for pair in found.pairs:
        name = pair.canonical
        new = (
            head + name.removeprefix("lm_head.")
            if pair.kind == "head"
            else body + name.removeprefix("model.")
        )
        renamed[new] = vlm[pair.vlm]
    return renamed


def test_names_as_published(family):
    _, llm = on_disk(family)
    for body, head in PUBLISHED[family]:
        vlm = published(family, body, head)
        found = mapped(vlm, llm)
        assert len(found.pairs) == len(mapped(*on_disk(family)).pairs)
        for pair in found.pairs:
            assert (
                torch.cosine_similarity(
                    llm[pair.llm].flatten(), vlm[pair.vlm][: len(llm[pair.llm])].flatten(), dim=0
                )
                > 0.9
            )


def test_a_language_model_saved_without_its_prefix_or_inside_a_vlm_maps_too(family):
    vlm, llm = on_disk(family)
    bare = {name.removeprefix("model."): weight for name, weight in llm.items()}
    assert [p.vlm for p in mapped(vlm, bare).pairs] == [p.vlm for p in mapped(vlm, llm).pairs]
    inside = mapped(vlm, vlm)
    assert all(pair.llm == pair.vlm for pair in inside.pairs)
    assert agree(mapped(vlm, llm), inside)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensor_that_is_missing_or_of_another_shape_is_named(data):
    vlm, llm = (shapes(side) for side in on_disk(data.draw(st.sampled_from(NAMES))))
    found = tower(vlm, llm)
    pair = data.draw(st.sampled_from([p for p in found.pairs if p.kind in ("layer", "norm")]))
    kind = data.draw(st.sampled_from(["missing", "shape", "surplus"]))
    changed, other = dict(vlm), dict(llm)
    if kind == "missing":
        del changed[pair.vlm]
        says = "missing in the tower"
    elif kind == "surplus":
        del other[pair.llm]
        says = "missing in the language model"
    else:
        changed[pair.vlm] = tuple(size + 1 for size in vlm[pair.vlm])
        says = "of another shape"
    with pytest.raises(AnchorsError, match=says) as error:
        tower(changed, other)
    assert pair.canonical.removeprefix("model.") in error.value.message
    assert error.value.remedy


def test_names_of_two_generations_in_one_checkpoint_are_doubled(family):
    vlm, llm = on_disk(family)
    found = mapped(vlm, llm)
    for pair in found.pairs:
        if pair.kind == "layer" and pair.layer == 1:
            twin = (
                "model.language_model."
                if not pair.vlm.startswith("model.language_model.")
                else "model.text_model."
            )
            with pytest.raises(AnchorsError, match="1 doubled in the tower") as error:
                mapped(vlm | {twin + pair.canonical.removeprefix("model."): vlm[pair.vlm]}, llm)
            assert pair.vlm in error.value.message
            break


def test_another_depth_width_or_architecture_is_refused(family):
    vlm, llm = (shapes(side) for side in on_disk(family))
    shallow = {name: shape for name, shape in llm.items() if ".layers.2." not in name}
    with pytest.raises(AnchorsError, match="missing in the language model"):
        tower(vlm, shallow)
    deep = llm | {name.replace(".2.", ".3."): shape for name, shape in llm.items() if ".layers.2." in name}
    with pytest.raises(AnchorsError, match="missing in the tower"):
        tower(vlm, deep)
    wide = {name: tuple(2 * size for size in shape) for name, shape in llm.items()}
    with pytest.raises(AnchorsError, match="of another shape") as error:
        tower(vlm, wide)
    assert "32 in the language model, 16 in the tower" in error.value.message
    with pytest.raises(AnchorsError, match=r"has no tensor `…embed_tokens\.weight`"):
        tower(vlm, {"transformer.h.0.attn.c_attn.weight": (16, 48), "transformer.wte.weight": (64, 16)})


def test_another_width_of_embedding_is_refused_but_other_rows_are_not():
    vlm, llm = (shapes(side) for side in on_disk("llava"))
    assert vlm["language_model.model.embed_tokens.weight"] == (VLM_ROWS, 16)
    assert llm["model.embed_tokens.weight"] == (ROWS, 16)
    tower(vlm, llm)
    with pytest.raises(AnchorsError, match="1 of another shape"):
        tower(vlm, llm | {"model.embed_tokens.weight": (ROWS, 8)})


def test_what_is_no_part_of_a_language_model_is_not_dropped_silently():
    vlm, llm = (shapes(side) for side in on_disk("llava"))
    with pytest.raises(AnchorsError, match="1 outside the language tower"):
        tower(vlm, llm | {"score.weight": (1, 16)})
    adapter = {f"base_model.model.{name}": shape for name, shape in llm.items()}
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(AnchorsError, match="missing in the tower") as error:
        tower(vlm, adapter | {lora: (4, 16)}, "the expert")
    assert error.value.message.startswith("The expert")
    # Constants of old checkpoints are nothing to merge.
    tower(vlm, llm | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)})


@pytest.mark.parametrize("stored", ["neither", "vlm", "llm", "both"])
def test_a_tied_head_is_handled_once(stored):
    vlm, llm = (shapes(side) for side in on_disk("smolvlm"))
    if stored in ("vlm", "both"):
        vlm["lm_head.weight"] = (VLM_ROWS, 16)
    if stored in ("llm", "both"):
        llm["lm_head.weight"] = (ROWS, 16)
    found = tower(vlm, llm)
    heads = [pair for pair in found.pairs if pair.kind == "head"]
    assert len(heads) == (stored in ("vlm", "both"))
    if stored == "vlm":
        assert heads[0].llm == "model.embed_tokens.weight"
    # Nothing to map it to: whoever merges must find it equal to the embedding.
    assert found.tied == ("lm_head.weight" if stored == "llm" else None)


def test_cross_attention_between_the_layers_shifts_their_numbers():
    """As in Mllama, whose tower has layers that the language model has not."""
    vlm, llm = (shapes(side) for side in on_disk("llava"))
    prefix = "language_model.model.layers."
    shifted = {}
    for name, shape in vlm.items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{int(layer) + (int(layer) >= 1)}.{rest}"
        shifted[name] = shape
    cross = {f"{prefix}1.cross_attn.q_proj.weight": (16, 16), f"{prefix}1.input_layernorm.weight": (16,)}
    found = tower(shifted | cross, llm)
    assert set(cross) < set(found.kept)
    placed = {pair.canonical: pair.vlm for pair in found.pairs}
    assert placed["model.layers.2.mlp.up_proj.weight"] == f"{prefix}3.mlp.up_proj.weight"
    assert placed["model.layers.0.mlp.up_proj.weight"] == f"{prefix}0.mlp.up_proj.weight"


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["model", "language_model", "text_model", "llm", "decoder", "x"]), max_size=3
    )
)
def test_the_prefix_of_a_tower_may_be_anything(words):
    vlm, llm = (shapes(side) for side in on_disk("llava"))
    prefix = "".join(f"{word}." for word in words)
    renamed = {name.replace("language_model.model.", prefix, 1): shape for name, shape in vlm.items()}
    found = tower(renamed, llm)
    plain = tower(vlm, llm)
    assert [p.canonical for p in found.pairs] == [p.canonical for p in plain.pairs]
    assert [p.vlm for p in found.pairs if p.kind != "head"] == [
        p.vlm.replace("language_model.model.", prefix, 1) for p in plain.pairs if p.kind != "head"
    ]
    assert set(found.kept) == set(plain.kept)


def test_modules_in_no_layer_belong_to_the_tower_too():
    """As the norm of LFM2's embeddings, OPT's positions, or Gemma 4's embeddings of every layer."""
    vlm, llm = (shapes(side) for side in on_disk("qwen2_vl"))
    more = {
        "embedding_norm.weight": (16,),
        "embed_tokens_per_layer.weight": (ROWS, 48),
        "altup.projections.0.weight": (4, 4),
    }
    inside = {f"model.{name}": shape for name, shape in more.items()}
    found = tower(vlm | inside, llm | inside)
    kinds = {pair.canonical: pair.kind for pair in found.pairs}
    assert kinds["model.embedding_norm.weight"] == kinds["model.altup.projections.0.weight"] == "norm"
    assert kinds["model.embed_tokens_per_layer.weight"] == "embedding"
    assert found.pairs[0].canonical == "model.embed_tokens.weight"
    with pytest.raises(AnchorsError, match="3 missing in the tower"):
        tower(vlm, llm | inside)


def test_eyes_behind_the_prefix_of_the_tower_are_no_part_of_it():
    """As the first LLaVA's code named them."""
    vlm, llm = (shapes(side) for side in on_disk("qwen2_vl"))
    eyes = {
        "model.mm_projector.0.weight": (16, 16),
        "model.image_newline": (16,),
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
    }
    assert set(eyes) < set(tower(vlm | eyes, llm).kept)
    assert set(eyes) < set(tower(vlm | eyes, vlm | eyes).kept)
    with pytest.raises(AnchorsError, match="3 outside the language tower"):
        tower(vlm, llm | eyes)


def test_agree_pairs_base_and_expert_whatever_they_call_things():
    vlm, llm = (shapes(side) for side in on_disk("llava"))
    bare = {re.sub(r"^model\.", "", name): shape for name, shape in llm.items()}
    both = agree(tower(vlm, llm), tower(vlm, bare))
    assert len(both) == len(llm)
    for base, expert in both:
        assert base.vlm == expert.vlm
        assert base.llm.endswith(expert.llm)


VOCABULARY = tokenizer().get_vocab()
SEEING = tokenizer("<image>").get_vocab()
COUNTS = (VLM_ROWS, ROWS, ROWS)


def test_keep_merges_no_row():
    assert align("keep", COUNTS, (SEEING, VOCABULARY, VOCABULARY)) is None


def test_shared_rows_leaves_new_tokens_and_padding_alone():
    rows = align("shared-rows", COUNTS, (SEEING, VOCABULARY, VOCABULARY))
    assert rows.vlm.tolist() == rows.base.tolist() == rows.expert.tolist() == list(range(TOKENS))


def test_shared_rows_refuses_other_tokenizers():
    permuted = tokenizer(order=lambda words: words[::-1]).get_vocab()
    with pytest.raises(
        AnchorsError, match="differ in 56 of the first 64 rows: row 4 is 'w0' and 'w55'"
    ) as error:
        align("shared-rows", COUNTS, (SEEING, VOCABULARY, permuted))
    assert "by-token" in error.value.remedy


def test_shared_rows_without_tokenizers_takes_the_first_rows():
    assert len(align("shared-rows", COUNTS)) == ROWS


def test_by_token_refuses_without_tokenizers_and_without_common_tokens():
    with pytest.raises(AnchorsError, match="needs the tokenizers"):
        align("by-token", COUNTS)
    with pytest.raises(AnchorsError, match="share no token"):
        align("by-token", COUNTS, (SEEING, VOCABULARY, {"another": 0}))
    with pytest.raises(AnchorsError, match="no embedding policy 'all'"):
        align("all", COUNTS)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_by_token_aligns_strings_never_numbers(data):
    words = [f"w{i}" for i in range(12)]

    def vocabulary(count: int) -> dict[str, int]:
        own = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=count, unique=True))
        return dict(zip(own, data.draw(st.permutations(range(count))), strict=False))

    counts = (12, 10, 8)
    three = tuple(vocabulary(count) for count in counts)
    common = set.intersection(*(set(own) for own in three))
    if not common:
        with pytest.raises(AnchorsError):
            align("by-token", counts, three)
        return
    rows = align("by-token", counts, three)
    strings = [{row: token for token, row in own.items()} for own in three]
    found = [
        [names[row] for row in column.tolist()]
        for names, column in zip(strings, (rows.vlm, rows.base, rows.expert), strict=True)
    ]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == common
    assert rows.vlm.tolist() == sorted(rows.vlm.tolist())


def test_rows_that_an_embedding_lacks_are_left_out():
    rows = align("by-token", (VLM_ROWS, 10, 20), (SEEING, VOCABULARY, VOCABULARY))
    assert len(rows) == 10


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_merging_rows_touches_no_other_row(policy):
    own = models("smolvlm")
    v, b, e = (model.get_input_embeddings().weight.detach() for model in (own.vlm, own.base, own.expert))
    rows = align(policy, (len(v), len(b), len(e)), (SEEING, VOCABULARY, VOCABULARY))
    merged = rows.merge(b, v, e, lambda b, v, e: v + 0.5 * (e - b))
    assert torch.equal(merged[TOKENS:], v[TOKENS:])
    assert torch.equal(merged[:TOKENS], v[:TOKENS] + 0.5 * (e[:TOKENS] - b[:TOKENS]))
    assert merged.dtype == v.dtype
    assert merged is not v


@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_another_layout_are_named_as_such(turned):
    plain = {
        "model.embed_tokens.weight": (8, 4),
        "model.norm.weight": (4,),
        "model.layers.0.input_layernorm.weight": (4,),
    }
    single = plain | {f"model.layers.0.mlp.experts.{n}.down_proj.weight": (4, 2) for n in range(3)}
    stacked = plain | {"model.layers.0.mlp.experts.down_proj": (3, 2, 4)}
    eyes = {"visual.patch.weight": (2, 2)}
    vlm, llm = (single, stacked) if turned else (stacked, single)
    seen = {name.replace("model.", "model.language_model.", 1): shape for name, shape in vlm.items()} | eyes
    with pytest.raises(AnchorsError, match=r"another layout.*one tensor an expert.*stacked"):
        tower(seen, llm)
