"""Flow in prompts with images: against materialised attention, and what must be refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from injection_vlms import FAMILIES, make_vlm, picture

from anchors.errors import AnchorsError
from anchors.flow.metrics import flow_sums
from anchors.flow.saliency import FlowTap
from anchors.injection.flow import ImagePrompt, collate, image_flow

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
        slopes = torch.autograd.grad(loss.sum(), out.attentions)
    finally:
        decoder.set_attn_implementation("anchors")
        vlm.model.requires_grad_(False)
    maps = torch.stack([(a * g).sum(1).abs() for a, g in zip(out.attentions, slopes, strict=True)], dim=1)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", [("red", "blue"), ()], ids=["two shots", "no shots"])
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
