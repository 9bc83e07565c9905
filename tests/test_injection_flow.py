"""Flow in prompts with images: against materialised attention, and what must be refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from injection_vlms import FAMILIES, HYBRIDS, MERGED, ONE_IMAGE, T5, blip, enliven, make_vlm, picture
from PIL import Image
from transformers import AttentionInterface, PreTrainedModel

from anchors.attention.seam import NAME
from anchors.errors import AnchorsError, CertificateError, RoutingError
from anchors.flow.metrics import flow_sums
from anchors.injection.asking.routing import prove, route_tower
from anchors.injection.asking.vlm import load_vlm, prepare_vlm
from anchors.injection.image_flow.flow import ImagePrompt, collate, demand, image_flow

IMAGE = "<image>"


def prompt(
    words: tuple[str, ...] = ("red", "blue"), answer: str | None = "seven", seed: int = 0
) -> ImagePrompt:
    """As many demonstrations as words, and a query of two image tokens' worth of text."""
    text, labels = "", []
    for word in words:
        text += f"{IMAGE} what is it ? = "
        labels.append((len(text), len(text) + len(word)))
        text += f"{word} \n "
    query = len(text)
    text += f"{IMAGE} what = " if seed else f"{IMAGE} is it big ? = "
    ends = None
    if answer is None:
        text = text.rstrip()
    else:
        ends = (len(text), len(text) + len(answer))
        text += answer
    images = tuple(picture(seed + i) for i in range(len(words) + 1))
    return ImagePrompt(text, images, tuple(labels), query, ends)


def literal(vlm, batch):
    """I_l with every attention matrix formed by transformers' own eager attention, and autograd's ∂L/∂A."""
    decoder = vlm.model.get_decoder()
    decoder.set_attn_implementation("eager")
    vlm.model.requires_grad_(True)
    try:
        out = vlm.model(**batch.tensors, output_attentions=True, use_cache=False)
        logits = out.logits[torch.arange(len(batch.target)), batch.target]
        loss = F.cross_entropy(logits, batch.answer, reduction="none")
        made = out.attentions if hasattr(out, "attentions") else out.language_model_outputs.attentions
        slopes = torch.autograd.grad(loss.sum(), made)
    finally:
        decoder.set_attn_implementation("anchors")
        vlm.model.requires_grad_(False)
    maps = torch.stack([(a * g).sum(1).abs() for a, g in zip(made, slopes, strict=True)], dim=1)
    return maps.double() * (1 - torch.eye(maps.shape[-1], dtype=torch.float64)), loss


def loops(flow, ids, labels, target, begins, image_id, both_ways):
    """The sums of one prompt as loops over pairs; `flow` is [layers, query, key]."""
    mass: dict[str, list] = {}
    spans = [k for k, token in enumerate(ids) if token == image_id]
    own = {k: sum(1 for j in range(k) if ids[j] == image_id and ids[j + 1] != image_id) for k in spans}
    for i in range(target + 1):
        for j in range(target + 1):
            sees = j < i or (both_ways and j > i and i in own and j in own and own[i] == own[j])
            if not sees:
                continue
            if i in labels:
                name = "ip" if ids[j] == image_id else "tp"
            elif i == target and j in labels:
                name = "pq"
            elif i == target and j >= begins:
                name = "iq" if ids[j] == image_id else "tq"
            else:
                name = "ww"
            mass.setdefault(name, []).append(flow[:, i, j])
    found = {f"s_{name}": torch.stack(values).mean(0) for name, values in mass.items()}
    if labels:
        found["s_wp"] = torch.stack(mass["ip"] + mass["tp"]).mean(0)
    return found


@pytest.mark.parametrize(
    ("family", "words"),
    [(family, words) for words in (("red", "blue"), ()) for family in (*FAMILIES, *HYBRIDS)]
    + [(f, ()) for f in (*ONE_IMAGE, *MERGED)],
)
def test_sums_are_those_of_materialised_attention(family, words):
    vlm = make_vlm(family)
    prompts = [prompt(words), prompt(tuple(reversed(words)), "one", seed=5)]
    batch = collate(vlm, prompts)
    found = image_flow(vlm, batch)
    maps, loss = literal(vlm, batch)
    torch.testing.assert_close(found.loss, loss.float(), rtol=1e-4, atol=1e-4)
    for row in range(2):
        begins = int(batch.query[row].nonzero()[0])
        expected = loops(
            maps[row], batch.tensors["input_ids"][row].tolist(), batch.labels[row].tolist(), int(batch.target[row]),
            begins, vlm.image_token_id, family == "gemma3",
        )  # fmt: skip
        assert set(expected) == {name for name in found.sums if name.startswith("s_")}
        for name, value in expected.items():
            assert value.abs().max() > 0, name
            assert (found.sums[name][row] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_two_shots_reuse_the_papers_sums():
    """S_wp and S_pq are those of `flow_sums`; only what is left over is smaller here."""
    vlm = make_vlm("llava")
    batch = collate(vlm, [prompt()])
    found = image_flow(vlm, batch)
    maps, _ = literal(vlm, batch)
    paper = flow_sums(
        maps[:, :, batch.labels[0]],
        maps[:, :, batch.target[0]],
        maps.sum((-1, -2)),
        batch.labels,
        batch.target,
    )
    for name in ("s_wp", "s_pq"):
        torch.testing.assert_close(found.sums[name], getattr(paper, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_tower_is_on_the_seam(family):
    vlm = make_vlm(family)
    inside = set(vlm.model.get_decoder().modules())
    assert len(vlm.modules) == vlm.n_layers == 3
    assert all(module in inside for module in vlm.modules)
    others = [m for m in vlm.model.modules() if isinstance(m, PreTrainedModel) and m not in inside]
    assert len(others) >= 2
    assert {m.config._attn_implementation for m in others} == {"sdpa"}


@pytest.mark.parametrize("family", [*FAMILIES, *ONE_IMAGE, *HYBRIDS])
def test_the_witness_is_the_model_s_own_eager_attention(family):
    """Images and all, with the processor's mask, before and after the tower was put on the seam."""
    vlm = make_vlm(family)
    shots = ((), ()) if family in ONE_IMAGE else (("red", "blue"), ("blue", "red"))
    own = prompt(shots[0])
    tensors = vlm.encode([own.text], [own.images]).tensors
    said = vlm.witness.answer(**tensors)
    assert {
        m.config._attn_implementation for m in vlm.model.get_decoder().modules() if hasattr(m, "config")
    } == {NAME}
    with torch.no_grad():
        assert torch.equal(said, fresh(vlm)(**tensors, use_cache=False).logits)
    demand(vlm, [own, prompt(shots[1], "one", seed=5)])


def fresh(vlm):
    """The model again, on transformers' own eager attention."""
    model = type(vlm.model)(copy.deepcopy(vlm.model.config))
    model.load_state_dict(vlm.model.state_dict())
    model.eval().set_attn_implementation("eager")
    return model


def test_a_witness_that_must_see_is_shown_a_picture():
    """Before anything was done to it, by its own processor; only another last token tells the two questions apart."""
    vlm = make_vlm("blip_2")
    with pytest.raises(TypeError, match="pixel_values"):
        vlm.model(input_ids=vlm.witness.ids)
    one, other = vlm.witness.ids.tolist()
    image = vlm.image_token_id
    assert one[:4] == other[:4] == [image] * 4
    assert one[4:-1] == other[4:-1]
    assert len({one[-1], other[-1], image}) == 3
    pixels = vlm.processor.image_processor([Image.new("RGB", (64, 64), (200, 60, 20))], return_tensors="pt")
    with torch.no_grad():
        for row, said in zip(vlm.witness.ids, vlm.witness.said, strict=True):
            own = fresh(vlm)(input_ids=row[None], pixel_values=pixels["pixel_values"]).logits[0]
            assert torch.equal(own, said)


def test_a_tower_that_must_see_and_looks_ahead_is_refused(monkeypatch):
    model, processor = blip()
    enliven(model)
    head = model.language_model.lm_head
    own = head.forward
    monkeypatch.setattr(head, "forward", lambda x: own(x + x.mean(1, keepdim=True)), raising=False)
    with pytest.raises(AnchorsError, match="is not causal as it is configured"):
        prepare_vlm(model, processor, "tiny", "float32", routed=True)


def test_image_features_made_of_the_text_are_refused():
    """As the untouched model shows, asked by its own processor: another last word moves what stands before it."""
    model, processor = blip("instructblip")
    enliven(model.eval())
    with torch.no_grad():
        said = [
            model(**processor(images=[picture()], text=[text], return_tensors="pt")).logits[0]
            for text in ("is it red", "is it blue")
        ]
        assert (said[0] - said[1])[:-1].norm() > 1e-3 * said[0][:-1].norm()
    with pytest.raises(AnchorsError, match="image features of the prompt's text, too") as refused:
        prepare_vlm(model, processor, "tiny", "float32", routed=True)
    assert refused.value.code == "not-causal"


def test_a_q_former_reads_prompts_and_no_answers():
    model, processor = blip("instructblip")
    enliven(model)
    vlm = prepare_vlm(model, processor, "tiny", "float32")
    texts, images = ["is it red", "big"], [picture(0), picture(1)]
    both = vlm.encode([IMAGE + text for text in texts], [[image] for image in images], [" yes", " no"])
    with torch.no_grad():
        found = model(**both.tensors).logits
        for row, (text, image) in enumerate(zip(texts, images, strict=True)):
            own = model(**processor(images=[image], text=[text], return_tensors="pt")).logits[0]
            torch.testing.assert_close(found[row, : len(own)], own, rtol=1e-4, atol=1e-5)


def test_a_model_on_disk_that_must_see(tmp_path):
    model, processor = blip()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert len(load_vlm(tmp_path, routed=True, device="cpu", precision="float32").modules) == 3


def test_a_text_read_by_an_encoder_is_refused():
    model, processor = blip(text=T5)
    with pytest.raises(AnchorsError, match="reads a prompt in an encoder") as refused:
        prepare_vlm(model, processor, "tiny", "float32", routed=True)
    assert refused.value.code == "model-kind"


def test_a_tower_that_is_another_one_on_the_seam_is_refused(monkeypatch):
    vlm, kinds = make_vlm("llava"), AttentionInterface._global_mapping
    own = kinds[NAME]
    monkeypatch.setitem(kinds, NAME, lambda *args, **how: (own(*args, **how)[0] * 1.05, None))
    with pytest.raises(RoutingError, match=r"logits of LlavaForConditionalGeneration .* differ from its own"):
        prove(vlm)


def test_a_tower_that_changes_with_the_length_of_prompts_fails(monkeypatch):
    """What is right on the few tokens of loading and wrong on a run's own prompts is found before these are measured."""
    vlm = make_vlm("qwen2_vl")
    layer, own = vlm.modules[1].o_proj, vlm.modules[1].o_proj.forward
    monkeypatch.setattr(layer, "forward", lambda x: own(x) * (1.05 if x.shape[1] > 20 else 1), raising=False)
    prove(vlm)
    image_flow(vlm, collate(vlm, [prompt()]))  # its own certificate is content
    with pytest.raises(CertificateError, match="logits on the seam differ from its own"):
        demand(vlm, [prompt()])


def test_a_layer_that_does_not_attend_is_named_as_such(monkeypatch):
    vlm = make_vlm("llava")
    attention = vlm.model.get_decoder().layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None), raising=False)
    with pytest.raises(RoutingError, match=r"arrived at the seam \[1, 0, 1\] times"):
        prove(vlm)


def test_what_only_holds_the_tower_may_share_its_configuration():
    """As InstructBLIP's OPT does: a language model around the decoder, with no attention of its own."""
    model = copy.deepcopy(make_vlm("llava").model)
    holder = PreTrainedModel(model.config.text_config)
    holder.decoder = model.model.language_model
    model.model.language_model = holder
    model.get_decoder = lambda: holder.decoder
    assert len(route_tower(model)) == 3


def test_shared_configuration_is_refused():
    vlm = make_vlm("llava")
    model = vlm.model
    kept = model.model.vision_tower.config
    try:
        model.model.vision_tower.config = model.config.text_config
        with pytest.raises(RoutingError, match="set that of"):
            route_tower(model)
    finally:
        model.model.vision_tower.config = kept


def test_answers_and_marks_stand_where_they_should():
    vlm = make_vlm("idefics3")
    text = f"{IMAGE} # what is it ? = red \n {IMAGE} big ="
    inputs = vlm.encode(
        [text, f"{IMAGE} {IMAGE} ="], [[picture(0), picture(1)]] * 2, [" yes no", " one"],
        marks=[[(text.index("red"), text.index("red") + 3)], []],
    )  # fmt: skip
    ids, words = inputs.ids, vlm.tokenizer
    for row, answer in enumerate(("yes no", "one")):
        at = inputs.answers[row][inputs.answers[row] >= 0]
        assert words.decode(ids[row, at[:-1]]).strip() == answer
        assert ids[row, at[-1]] == vlm.end
        assert at[0] == inputs.prompts[row]
        assert inputs.tensors["attention_mask"][row].sum() == at[-1] + 1
    assert [words.decode(ids[0, list(mark)]) for mark in inputs.marked[0]] == ["red"]


def test_marks_behind_an_image_that_the_processor_sets():
    vlm = make_vlm("blip_2")
    texts = [f"{IMAGE} # what is it ? = red", f"{IMAGE}big ="]
    inputs = vlm.encode(
        texts, [[picture(0)], [picture(1)]], [" yes no", " one"],
        marks=[[(texts[0].index("red"), len(texts[0]))], [(texts[1].index("big"), texts[1].index("="))]],
    )  # fmt: skip
    words = vlm.tokenizer
    assert [words.decode(ids[list(own[0])]) for ids, own in zip(inputs.ids, inputs.marked, strict=True)] == [
        "red",
        "big",
    ]
    assert inputs.ids.eq(vlm.image_token_id).sum(1).tolist() == [4, 4]
    assert inputs.prompts.tolist() == [4 + 7, 4 + 2]


def test_images_where_a_processor_sets_none_are_refused():
    vlm = make_vlm("blip_2")
    for text, images in ((f"a {IMAGE}", 1), (f"{IMAGE} {IMAGE} a", 2), ("a", 0)):
        with pytest.raises(AnchorsError, match="does not begin with its only image"):
            vlm.encode([text], [[picture()] * images])
    model, processor = blip()
    processor.num_query_tokens = 3
    with pytest.raises(AnchorsError, match=r"puts 3 image tokens .* makes 4 features"):
        prepare_vlm(model, processor, "tiny", "float32", routed=True)


def test_padding_changes_nothing():
    vlm = make_vlm("qwen2_vl")
    long, short = prompt(), prompt(("blue", "red"), "one", seed=5)
    both, alone = image_flow(vlm, collate(vlm, [long, short])), image_flow(vlm, collate(vlm, [short]))
    for name, value in alone.sums.items():
        torch.testing.assert_close(both.sums[name][1:], value, rtol=1e-4, atol=1e-8)


def test_surprise_makes_log_odds_of_the_loss():
    """Where p is close to 1 the loss has no gradient left that float32 could hold; that of the log-odds stays."""
    vlm = make_vlm("llava")
    batch = collate(vlm, [prompt(answer=None)])
    found = image_flow(vlm, batch)
    assert found.answer.equal(found.predicted)
    torch.testing.assert_close(found.surprise, -torch.expm1(-found.loss.double()), rtol=1e-4, atol=1e-7)
    head = vlm.model.get_output_embeddings().weight
    kept = head.data
    try:
        head.data = kept * 2000
        sure = image_flow(vlm, batch)
    finally:
        head.data = kept
    assert sure.surprise < 1e-8 < float(sure.sums["s_iq"].sum() / sure.surprise)


def refused(change, match, family="llava"):
    vlm = make_vlm(family)
    with pytest.raises(AnchorsError, match=match):
        collate(vlm, [change(prompt())])


def test_bad_prompts_are_refused():
    refused(lambda p: replace(p, images=p.images[:-1]), "3 places for images and 2 images")
    refused(lambda p: replace(p, labels=(p.labels[0], p.labels[0])), "share a token")
    refused(lambda p: replace(p, text=p.text + " what" * 300), "longer than the 256")
    refused(lambda p: replace(p, text=p.text.replace("is it", "<|image_pad|>")), "as text", "qwen2_vl")
    refused(lambda p: replace(p, labels=((len(IMAGE), len(IMAGE) + 1), p.labels[1])), "No token")
    vlm = make_vlm("llava")
    with pytest.raises(AnchorsError, match="as many demonstrations"):
        collate(vlm, [prompt(), prompt(())])
    with pytest.raises(AnchorsError, match="is not on the seam"):
        image_flow(replace(vlm, modules=()), collate(vlm, [prompt()]))
    with pytest.raises(AnchorsError, match="Encode them apart"):
        vlm.encode([f"{IMAGE} a", "a"], [[picture()], []])


def test_labels_with_the_same_first_token_are_refused():
    """Two words that the tokenizer does not know begin with the same (unknown) token."""
    with pytest.raises(AnchorsError, match="begin with the same token"):
        collate(make_vlm("llava"), [prompt(("unheard", "unseen"))])
