"""Which part of a picture an image token stands for: held to what the model itself makes of a bright spot there."""

import copy

import numpy as np
import pytest
import torch
from injection_vlms import FAMILIES, MORE, make_vlm
from PIL import Image

from anchors.injection.asking.geometry import LAYOUTS, places

SIZES = ((120, 48), (50, 100))
JOINERS = ("out_proj", "attn.proj", "projection_layer")
"""By what vision towers end their attention."""


def short_sighted(model):
    """A copy whose vision tower does not attend, so that each of its patches sees itself alone."""
    found = copy.deepcopy(model)
    inside = set(found.get_decoder().modules())
    silent = 0
    for name, module in found.named_modules():
        if module not in inside and name.endswith(JOINERS):
            silent += 1
            for weight in module.parameters():
                weight.zero_()
    assert silent >= 2  # blocks of each tiny vision tower
    return found


@torch.no_grad()
def embedded(model, vlm, image):
    """What the language tower is given at the image tokens, by the processor and the model's own code."""
    inputs = vlm.encode(["<image> a"], [[image]])
    caught = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs.tensors, use_cache=False)
    hook.remove()
    return caught[0][0, inputs.ids[0] == vlm.image_token_id]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_a_bright_spot_moves_the_token_that_stands_for_its_place(family, monkeypatch):
    """End to end, with nothing of ours between the picture and the features: picture, processor, vision tower, packing."""
    vlm = make_vlm(family)
    if family == "qwen2_vl":  # so small a picture that it has one row of tokens otherwise
        monkeypatch.setattr(
            vlm.processor.image_processor, "size", {"shortest_edge": 64, "longest_edge": 1024}
        )
    model = short_sighted(vlm.model)
    for width, height in SIZES:
        found = places(vlm, (width, height))
        assert found.boxes is not None, found.reason
        sheets = np.array(found.sheets)
        black = Image.new("RGB", (width, height))
        dark = embedded(model, vlm, black)
        assert len(dark) == len(found.boxes) == found.count
        named = ~np.isnan(found.boxes[:, 0])
        tried = np.flatnonzero(named)
        for token in tried[:: -(-len(tried) // 11)]:
            left, top, right, bottom = np.clip(found.boxes[token], 0, 1) * (width, height, width, height)
            if min(right - left, bottom - top) < 4:  # nearly all padding
                continue
            x, y, across, down = (
                (left + right) / 2,
                (top + bottom) / 2,
                (right - left) / 4,
                (bottom - top) / 4,
            )
            spot = black.copy()
            spot.paste((255, 255, 255), tuple(round(v) for v in (x - across, y - down, x + across, y + down)))
            moved = (embedded(model, vlm, spot) - dark).norm(dim=-1).numpy()
            assert moved[~named].max(initial=0) == 0
            for sheet in set(found.sheets):
                own = np.flatnonzero((sheets == sheet) & named)
                most = own[moved[own].argmax()]
                l, t, r, b = found.boxes[most] * (width, height, width, height)
                assert l - across < x < r + across, (family, (width, height), token, most)
                assert t - down < y < b + down, (family, (width, height), token, most)
                assert sheets[token] != sheet or most == token, (family, (width, height), token, most)


def test_every_known_layout_is_tried():
    kinds = {make_vlm(family).model.config.model_type for family in (*FAMILIES, *MORE)}
    assert kinds == set(LAYOUTS)
