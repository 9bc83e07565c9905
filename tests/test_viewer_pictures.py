"""The page of prompts with pictures: its numbers, what it refuses, and the page in a real headless Chromium."""

import base64
import copy
import io
import json

import pytest
import torch
from injection_vlms import make_vlm, picture
from PIL import Image
from test_injection_flow import literal, loops, prompt
from test_viewer import HOSTILE, embedded
from test_viewer_browser import quiet, viewer  # noqa: F401 - fixtures

from anchors.injection.image_flow.arcs import KINDS, ArcTap
from anchors.injection.image_flow.flow import collate, image_flow
from anchors.injection.image_flow.shown import inlined, picture_page, prompt_payload
from anchors.viewer import render_page

TOWERS = ("qwen2_vl", "llava", "gemma3", "internvl", "idefics3", "llava_next", "qwen3_5")


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("words", [("red", "blue"), ()], ids=["shots", "plain"])
def test_patch_flows_are_the_gradient_of_materialised_attention(family, words, monkeypatch):
    """All that the page draws, against transformers' own eager attention and autograd's ∂L/∂A."""
    monkeypatch.setattr("anchors.injection.image_flow.shown.KEEP", 10**6)
    vlm, asked = make_vlm(family), prompt(words)
    batch = collate(vlm, [asked])
    maps, _ = literal(vlm, batch)
    whole, target = maps[0].detach(), int(batch.target[0])
    made = prompt_payload(vlm, asked, "a", vlm.layers)
    ids, labels = batch.tensors["input_ids"][0].tolist(), batch.labels[0].tolist()
    image = torch.tensor([i == vlm.image_token_id for i in ids])
    assert made["patches"] == image.nonzero().flatten().tolist()
    wanted = {"target": whole[:, target], "later": whole[:, ~image].sum(1)}
    if labels:
        wanted["labels"] = whole[:, labels].sum(1)
    assert set(made["into"]) == set(wanted)
    for kind, rows in wanted.items():
        drawn = torch.tensor(made["into"][kind], dtype=torch.float64)
        assert drawn.max() > 0
        torch.testing.assert_close(drawn, rows[:, image], rtol=2e-3, atol=1e-5 * float(rows.max()))
    sums = loops(whole, ids, labels, target, made["begins"], vlm.image_token_id, family == "gemma3")
    counts, near = made["pairs"], {"rtol": 1e-4, "atol": 1e-6 * float(whole.max())}
    for kind in [kind for kind in KINDS if labels or kind in ("iq", "tq", "ww")]:
        assert sums[f"s_{kind}"].max() > 0
        torch.testing.assert_close(
            torch.tensor(attended(vlm, made[f"s_{kind}"]), dtype=torch.float64), sums[f"s_{kind}"], **near
        )
    total = sum(
        counts[kind] * torch.tensor(attended(vlm, made[f"s_{kind}"]), dtype=torch.float64) for kind in counts
    )
    torch.testing.assert_close(total, whole.sum((1, 2)), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        torch.tensor(made["first"], dtype=torch.float64), whole[:, :, 0].sum(1), rtol=1e-4, atol=1e-12
    )
    for layer, arcs in enumerate(made["edges"]):
        found = {(i, j): w for i, j, w in arcs}
        expected = {
            (i, j): float(whole[layer, i, j]) for i in range(target + 1) if not image[i] for j in range(i)
        }
        expected = {pair: w for pair, w in expected.items() if w > 0}
        assert set(found) == set(expected)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert found == pytest.approx(expected, rel=2e-3, abs=near["atol"])


def attended(vlm, values):
    """The values of the layers that attend; the others have none."""
    assert [layer for layer, value in enumerate(values) if value is not None] == list(vlm.layers)
    return [value for value in values if value is not None]


def test_the_page_of_a_hybrid_stops_at_the_layers_that_attend(viewer):
    vlm = make_vlm("qwen3_5")
    page = picture_page(vlm, {"one": prompt(), "two": prompt(seed=5)}, {})
    viewer.open(json.loads(embedded(page)), "#prompt=1&layer=0&beside=2:0")
    assert vlm.layers == (1,)
    for key in ("k", "j", "c", "b", "f"):
        viewer.keys(key)
        assert viewer.text("#at") == "1 / 2"
    rows = viewer.each("#sums tbody tr", "[...e.children].map(c => c.textContent)")
    assert [row[1:] == ["no attention"] for row in rows] == [True, False, True]
    assert any("recurrent state, too (in layers 0, 2)" in note for note in viewer.each("#notes li"))


def test_only_the_strongest_arcs_are_kept_whatever_the_tiles(monkeypatch):
    vlm, asked = make_vlm("qwen2_vl"), prompt()
    batch = collate(vlm, [asked])
    layers = frozenset(range(vlm.n_layers))
    every, few = ArcTap(batch, layers, 1000), ArcTap(batch, layers, 3)
    image_flow(vlm, batch, [every])
    from anchors.attention import streaming

    monkeypatch.setitem(streaming.TILE_BYTES, "cpu", 1)  # a row a tile
    image_flow(vlm, batch, [few])
    for layer in layers:
        for (kind, first), (_, values) in every.arcs[layer].items():
            kept = few.arcs[layer][kind, first][1]
            torch.testing.assert_close(kept, values.sort(descending=True).values[: len(kept)])
            assert len(kept) == min(3, len(values))
        torch.testing.assert_close(few.target[layer], every.target[layer])
        torch.testing.assert_close(few.given[layer], every.given[layer])


def test_what_is_kept_grows_with_the_tokens_and_not_with_their_square():
    vlm = make_vlm("qwen2_vl")

    def kept(shots: int) -> tuple[int, int]:
        batch = collate(vlm, [prompt(("red", "blue") * shots)])
        tap = ArcTap(batch, frozenset(range(vlm.n_layers)), 5)
        image_flow(vlm, batch, [tap])
        rows = [x for own in (tap.target, tap.labels, tap.given) for x in own.values()]
        arcs = [x for own in tap.arcs.values() for pair in own.values() for x in pair]
        return batch.image.shape[1], sum(x.numel() for x in rows + arcs + [tap.kinds])

    (tokens, numbers), (more, then) = kept(1), kept(4)
    assert more > 2.5 * tokens
    assert then - numbers <= 12 * vlm.n_layers * (
        more - tokens
    )  # rows of so many tokens; the arcs are as many
    assert then < more * more


def test_a_family_whose_patches_have_no_place_is_a_strip_with_its_reason():
    vlm = make_vlm("blip_2")
    made = prompt_payload(vlm, prompt(()), "a", [0])
    assert made["pictures"][0]["sheets"] == []
    assert made["pictures"][0]["strip"] == made["patches"] == [0, 1, 2, 3]
    assert any("learned questions to the whole picture" in note for note in made["notes"])


def test_an_unknown_family_is_a_strip(monkeypatch):
    from anchors.injection.asking import geometry

    monkeypatch.delitem(geometry.LAYOUTS, "llava")
    made = prompt_payload(make_vlm("llava"), prompt(()), "a", [0])
    assert made["pictures"][0]["sheets"] == []
    assert len(made["pictures"][0]["strip"]) == 4
    assert any("is not known of the family 'llava'" in note for note in made["notes"])


def test_a_picture_is_written_anew_and_small():
    """Nothing of the file goes along but pixels."""
    big = Image.effect_noise((3000, 1000), 90).convert("RGB")
    big.info["comment"] = b"secret"
    exif = Image.Exif()
    exif[0x010E] = "secret"
    file = io.BytesIO()
    big.save(file, "JPEG", exif=exif, comment="secret")
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        source = inlined(opened)
    raw = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
    assert b"secret" in file.getvalue()
    assert b"secret" not in raw
    with Image.open(io.BytesIO(raw)) as small:
        assert small.size == (768, 256)
    tiny = inlined(picture())
    with Image.open(io.BytesIO(base64.b64decode(tiny.removeprefix("data:image/png;base64,")))) as same:
        assert same.tobytes() == picture().tobytes()


@pytest.fixture(scope="module")
def data():
    """A page of two pictures, one of them cut into tiles, as plain data."""
    vlm = make_vlm("internvl")
    asked = prompt(("red", "blue"))
    from dataclasses import replace

    wide = replace(asked, images=(*asked.images[:2], picture(9).resize((40, 18))))
    page = picture_page(vlm, {"one": asked, "two": wide}, {})
    return json.loads(embedded(page))


def test_page_rejects_pictures_that_do_not_fit(data):
    def broken(change) -> str:
        own = copy.deepcopy(data)
        change(own["prompts"][0])
        with pytest.raises(ValueError, match="prompts") as caught:
            render_page(own)
        return str(caught.value)

    def put(*path_value):
        def change(own):
            *path, last, value = path_value
            for part in path:
                own = own[part]
            own[last] = value

        return change

    assert "no inlined PNG" in broken(put("pictures", 0, "src", "https://example.org/a.png"))
    assert "no inlined PNG" in broken(put("pictures", 0, "src", "data:image/svg+xml;base64,AAAA"))
    assert "each of the patches once" in broken(put("pictures", 0, "sheets", []))
    assert "places token" in broken(put("pictures", 0, "sheets", 0, 0, 1, 2))
    assert "another shape" in broken(put("into", "target", [[0.0]]))
    assert "role image" in broken(put("patches", [1]))
    assert "s_iq" in broken(put("s_iq", [1.0]))


def test_patches_are_drawn_where_they_are_and_follow_the_layer(viewer, data):
    viewer.open(data, "#prompt=2&layer=0")
    shown = data["prompts"][1]
    cells = [sheet for own in shown["pictures"] for sheet in own["sheets"]]
    assert (
        len(viewer.each("#pictures figure", "0")) == len(cells) == 4
    )  # the last picture: its tiles, and all of it
    assert viewer.js("document.images.length") == 4
    viewer.until("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    for n, sheet in enumerate(cells):
        boxes = viewer.js(
            """(n => { const f = document.querySelectorAll('#pictures figure')[n], s = f.querySelector('.seen').getBoundingClientRect();
            return [...f.querySelectorAll('.seen rect')].map(e => { const b = e.getBoundingClientRect();
              return [+e.dataset.i, (b.left - s.left) / s.width, (b.top - s.top) / s.height, (b.right - s.left) / s.width, (b.bottom - s.top) / s.height]; }); })(arguments[0])""",
            n,
        )
        assert [row[0] for row in boxes] == [row[0] for row in sheet]
        for drawn, wanted in zip(boxes, sheet, strict=True):
            assert drawn[1:] == pytest.approx(wanted[1:], abs=0.01)
    for layer in range(3):
        assert viewer.layer == str(layer)
        row = dict(zip(shown["patches"], shown["into"]["target"][layer], strict=True))
        drawn = dict(viewer.each("#pictures rect", "[+e.dataset.i, +e.getAttribute('fill-opacity')]"))
        most = max(row.values())
        assert drawn == pytest.approx({i: 0.85 * (value / most) ** 0.5 for i, value in row.items()}, abs=2e-3)
        share = sum(row[i] for i, *_ in cells[0]) / sum(row.values())
        assert (
            f"Picture 1: {100 * share:.1f} % of the flow from patches into the target in layer {layer}"
            in viewer.text("#pictures figcaption")
        )
        viewer.keys("k")
    kinds = {kind for *_, kind in viewer.arcs}
    assert kinds <= set(data["kinds"])
    assert "iq" in kinds
    for i, j, kind in viewer.arcs:
        picture_given = shown["roles"][j] == "image"
        assert (kind == "iq") == (shown["roles"][i] == "target" and picture_given and j >= shown["begins"])
        assert (kind == "ip") == (shown["roles"][i] == "label" and picture_given)
    assert viewer.text("#answers") == "Likely first tokens of the answer"
    assert "S" in viewer.text("#chart .end.iq")


def test_pictures_are_reached_and_walked_by_keys(viewer, data):
    from selenium.webdriver.common.keys import Keys

    viewer.open(data, "#prompt=1&layer=1&into=labels")
    assert viewer.js("document.getElementById('into').value") == "labels"
    for _ in range(60):
        viewer.keys(Keys.TAB)
        if viewer.js("document.activeElement.classList.contains('picture')"):
            break
    shown = data["prompts"][0]
    row = dict(zip(shown["patches"], shown["into"]["labels"][1], strict=True))
    own = sorted((i for i, *_ in shown["pictures"][0]["sheets"][0]), key=lambda i: (-row[i], i))
    picked = lambda: viewer.each(".token.picked", "+e.dataset.i")  # noqa: E731
    viewer.keys(Keys.ARROW_DOWN)
    assert picked() == [own[0]] == viewer.each("#pictures rect.picked", "+e.dataset.i")
    viewer.keys(Keys.ARROW_DOWN)
    assert picked() == [own[1]]
    viewer.keys(Keys.ARROW_UP, Keys.ARROW_RIGHT)
    assert (picked(), viewer.layer) == ([own[0]], "2")
    assert viewer.js("document.activeElement.getAttribute('aria-label')").startswith("Picture 1: ")
    viewer.keys(Keys.ESCAPE)
    assert picked() == []
    viewer.until("location.hash.includes('into=labels')")
    viewer.keys("b")  # side by side: two layers of one prompt, each with its pictures
    assert len(viewer.each("#pictures2 figure", "0")) == 3
    words = [viewer.text(f"{pane} figcaption") for pane in ("#pictures", "#pictures2")]
    assert words[0] != words[1]


def test_names_of_patches_and_answers_are_text(viewer, data):
    own = copy.deepcopy(data)
    first = own["prompts"][0]
    first["tokens"][: len(HOSTILE)] = HOSTILE
    for k, i in enumerate(first["patches"][: len(HOSTILE)]):
        first["tokens"][i] = HOSTILE[k]
    first["labels"] = [HOSTILE[k % 2] for k in range(len(first["labels"]))]
    viewer.open(own, "#prompt=1&layer=0")
    viewer.click("#pictures rect")
    viewer.js("document.getElementById('svg').click()")
    assert viewer.js("window.pwned === undefined && document.scripts.length === 2")


def test_a_strip_is_drawn_by_index(viewer):
    page = picture_page(make_vlm("blip_2"), {"a": prompt(())}, {})
    viewer.open(json.loads(embedded(page)), "#prompt=1&layer=1")
    assert viewer.each("#pictures .ends rect", "+e.dataset.i") == [0, 1, 2, 3]
    assert viewer.each("#pictures .seen rect", "0") == []
    assert "learned questions to the whole picture" in viewer.text("#notes")


def test_the_saved_picture_holds_the_pictures(viewer, data):
    viewer.open(data, "#prompt=1&layer=1")
    viewer.js(
        "(() => { window.saved = []; HTMLAnchorElement.prototype.click = function () { window.saved.push(this.href); }; })()"
    )
    viewer.keys("s", "n")
    viewer.until("window.saved.length === 2")
    drawing, raster = viewer.js("window.saved")
    from urllib.parse import unquote

    text = unquote(drawing.split(",", 1)[1])
    assert text.count("<image ") == 3
    assert data["prompts"][0]["pictures"][0]["src"] in text
    with Image.open(io.BytesIO(base64.b64decode(raster.split(",", 1)[1]))) as png:
        assert min(png.size) > 300
