"""The viewer's page: its pure parts. The page in a browser is tested in test_viewer_browser.py."""

import copy
import json
import re
from importlib.resources import files

import numpy as np
import pytest

from anchors.flow import flow
from anchors.tasks.data import read
from anchors.tasks.drawing import Draw, draw
from anchors.tasks.task import TASKS
from anchors.viewer import render_page
from anchors.viewer.page import KEEP, edges, flows
from anchors.viewer.payload import prompt_payload

HOSTILE = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    " \"quoted\" 'too' &amp; {{payload}} {{title}}",
    "🙂👩‍👩‍👧",
    "a\u2028b\u2029c",
    "\u202eback",
    "\r\n",
    "\t",
    "",
    "    indented",
    "\ufffd",
    "<!--",
]


def payload() -> dict:
    """Two demonstrations and a query, small enough to count its arcs by hand."""
    tokens = ["Review", ":", " good", " fun", "\n", "Sentiment", ":", " Positive", "\n\n"]
    tokens += ["Review", ":", " dull", "\n", "Sentiment", ":", " Negative", "\n\n"]
    tokens += ["Review", ":", " warm", "\n", "Sentiment", ":"]
    roles = ["format"] * len(tokens)
    for i in (2, 3, 11, 19):
        roles[i] = "text"
    roles[7] = roles[15] = "label"
    roles[22] = "target"
    classes: list[int | None] = [None] * len(tokens)
    classes[7], classes[15] = 1, 0
    prompt = {
        "name": "first",
        "tokens": tokens,
        "roles": roles,
        "classes": classes,
        "labels": ["Negative", "Positive"],
        "gold": 1,
        "predicted": 1,
        "probabilities": [0.25, 0.75],
        "layers": [0, 1, 2, 4],
        "edges": [
            [[7, 2, 0.9], [7, 3, 0.5], [15, 11, 0.45], [11, 9, 0.2], [19, 2, 0.1]],
            [[22, 7, 0.8], [22, 15, 0.6], [7, 2, 0.2], [19, 17, 0.1]],
            [],
            [[22, 7, 0.4]],
        ],
        "keep": 100,
        "first": [0.0, 0.0, 0.0, 0.0],
        "s_wp": [0.6, 0.2, 0.0, 0.1, 0.1],
        "s_pq": [0.1, 0.6, 0.0, 0.7, 0.8],
        "s_ww": [0.3, 0.2, 0.0, 0.2, 0.1],
        "s_pq_rest": [0.0] * 5,
        "notes": [],
    }
    second = copy.deepcopy(prompt) | {"name": "second", "gold": 0, "notes": ["One <b>note</b>."]}
    bands = {"mean": [0.5, 0.4, 0.3], "low": [0.4, 0.3, 0.2], "high": [0.6, 0.5, 0.4]}
    return {
        "title": "A test",
        "model": "tiny",
        "task": "sst2",
        "command": "anchors view sst2",
        "provenance": {"seed": 1, "torch": "2.11"},
        "curves": {"layers": [0, 1, 2], "examples": 20, "s_wp": bands, "s_pq": bands, "s_ww": bands},
        "prompts": [prompt, second],
    }


def embedded(page: str) -> str:
    found = re.search(r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL)
    assert found
    return found[1]


# ---- edges ----


def test_edges_takes_the_lower_triangle_strongest_first():
    matrix = np.array([[9.0, 9.0, 9.0], [0.25, 9.0, 9.0], [0.0, 0.123456, 9.0]])
    assert edges(matrix) == [[1, 0, 0.25], [2, 1, 0.1235]]


def test_edges_keeps_reading_order_among_ties_and_cuts_at_keep():
    matrix = np.tril(np.ones((4, 4), dtype=np.float32), -1)
    matrix[3, 1] = 2
    everything = [[3, 1, 2.0], [1, 0, 1.0], [2, 0, 1.0], [2, 1, 1.0], [3, 0, 1.0], [3, 2, 1.0]]
    assert edges(matrix) == everything
    for keep in range(7):
        assert edges(matrix, keep=keep) == everything[:keep]


def test_edges_agrees_with_a_plain_sort():
    matrix = np.random.default_rng(3).integers(-3, 9, (40, 40)) / 7
    every = [(i, j, float(matrix[i, j])) for i in range(40) for j in range(i) if matrix[i, j] > 0]
    expected = [[i, j, float(f"{w:.4g}")] for i, j, w in sorted(every, key=lambda flow: -flow[2])[:50]]
    assert edges(matrix, keep=50) == expected
    assert json.loads(json.dumps(expected)) == expected


def test_edges_keeps_the_strongest_of_every_flow_and_the_first_tokens_apart():
    """Against plain loops over the pairs."""
    classes = [None, None, 1, None, 0, None, None, None]
    matrix = np.random.default_rng(5).integers(0, 6, (8, 8)) / 7
    by_group: dict = {}
    for i in range(8):
        for j in range(i):
            kind = 2 if i == 7 and j in (2, 4) else 1 if i in (2, 4) else 0
            assert flows(classes, 7)[i, j] == kind + 3 * (j == 0)
            if matrix[i, j] > 0:
                by_group.setdefault((kind, j == 0), []).append([i, j, float(f"{matrix[i, j]:.4g}")])
    kept = sorted(e for own in by_group.values() for e in sorted(own, key=lambda e: -e[2])[:2])
    assert edges(matrix, 2, flows(classes, 7)) == sorted(kept, key=lambda e: -e[2])
    assert flows([0, None], 1).tolist() == [[1, 1], [2, 0]]  # a first token that is counted is no sink


def test_edges_of_one_token_or_of_nothing_is_empty():
    assert edges(np.ones((1, 1))) == []
    assert edges(np.zeros((5, 5))) == []


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_edges_rejects_what_is_not_square(shape):
    with pytest.raises(ValueError, match="square"):
        edges(np.ones(shape))


def test_edges_rejects_nan_below_the_diagonal_only():
    matrix = np.ones((3, 3))
    matrix[0, 2] = np.nan
    assert len(edges(matrix)) == 3
    matrix[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"matrix\[2, 1\] is nan"):
        edges(matrix)


# ---- render_page ----


def test_page_embeds_exactly_the_payload():
    data = payload()
    data["prompts"][0]["tokens"][: len(HOSTILE)] = HOSTILE
    data["title"] = "</title> {{payload}} & \u2028 \ud800"
    text = embedded(render_page(data))
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert json.loads(text) == data


def test_page_escapes_its_title_and_can_be_written():
    data = payload() | {"title": "<b>\"x\" & 'y'</b> \ud800 {{payload}}"}
    page = render_page(data)
    assert "<title>&lt;b&gt;&quot;x&quot; &amp; &#x27;y&#x27;&lt;/b&gt; ? {{payload}}</title>" in page
    page.encode("utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_page_rejects_numbers_that_json_lacks_and_says_where(value):
    data = payload()
    data["prompts"][1]["s_pq"][3] = value
    with pytest.raises(ValueError, match=rf"payload\['prompts'\]\[1\]\['s_pq'\]\[3\] is {value}"):
        render_page(data)


def test_page_rejects_what_is_not_plain_data_and_says_where():
    data = payload()
    data["prompts"][0]["probabilities"] = [np.float32(0.5), 0.5]
    with pytest.raises(TypeError, match=r"\['probabilities'\]\[0\] is a float32"):
        render_page(data)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("roles", ["text"], r"\['roles'\] has 1 entries for 23 tokens"),
        ("classes", [7] + [None] * 22, r"\['classes'\] holds 7"),
        ("edges", [], "has 0 entries for 4 layers"),
        ("first", [0.5], r"\['first'\] has 1 entries for 4 layers"),
        ("edges", [[], [[2, 5, 0.1]], [], []], r"layer 1 holds \[2, 5, 0.1\]"),
        ("edges", [[], [], [], [[2, 1, 0]]], "w > 0"),
        ("layers", [0, 1, 2, 5], "holds 5; its sums have 5 layers"),
        ("s_ww", [0.5], r"\['s_ww'\] has 1 entries for 5 layers"),
        ("s_pq_rest", [0.5], r"\['s_pq_rest'\] has 1 entries for 5 layers"),
        ("probabilities", [1.0], "has 1 entries for 2 labels"),
        ("predicted", 2, r"\['predicted'\] holds 2"),
        ("gold", -1, r"\['gold'\] holds -1"),
    ],
)
def test_page_rejects_lists_that_do_not_fit(field, value, message):
    data = payload()
    data["prompts"][1][field] = value
    with pytest.raises(ValueError, match=message) as caught:
        render_page(data)
    assert str(caught.value).startswith("payload['prompts'][1]")


def test_page_rejects_an_unknown_role_short_curves_and_no_prompts():
    data = payload()
    data["prompts"][0]["roles"][0] = "noise"
    with pytest.raises(ValueError, match="'noise'"):
        render_page(data)
    data = payload()
    data["curves"]["s_wp"] = {"mean": [1.0], "low": [1.0], "high": [1.0]}
    with pytest.raises(ValueError, match="one number per layer"):
        render_page(data)
    with pytest.raises(ValueError, match="at least one prompt"):
        render_page(payload() | {"prompts": []})


def test_a_page_of_two_thousand_tokens_stays_below_two_megabytes():
    length, layers = 2000, 30
    classes = [1 if i % 40 == 39 else None for i in range(length - 1)] + [None]
    matrix = np.random.default_rng(0).random((length, length), dtype=np.float32)
    found = edges(matrix, groups=flows(classes, length - 1))
    # A label word takes one arc from the first token, and gives one.
    assert len(found) == 3 * KEEP + 2 * (length // 40 - 1)
    data = payload()
    first = data["prompts"][0] | {
        "tokens": [f" token{i}" for i in range(length)],
        "roles": ["format"] * (length - 1) + ["target"],
        "classes": classes,
        "layers": list(range(layers)),
        "edges": [found] * layers,
        "first": [1 / 3] * layers,
    }
    first |= dict.fromkeys(("s_wp", "s_pq", "s_ww", "s_pq_rest"), [1 / 3] * layers)
    assert len(render_page(data | {"prompts": [first]}).encode()) < 2e6


def test_a_prompts_flow_adds_up_from_its_averages(gpt2):
    """What the page multiplies back, averages times pairs, and what it says of the first token, against the whole map."""
    task = TASKS["sst2"]
    (drawn,) = draw(task, read(task), gpt2.tokenizer, Draw(), 1)
    made = prompt_payload(gpt2, task, drawn.prompt, "a", range(gpt2.n_layers))
    maps = flow(gpt2, [drawn.prompt], maps=range(gpt2.n_layers)).maps
    counted = [i for i, c in enumerate(made["classes"]) if c is not None]
    last = made["roles"].index("target")
    wp, pq = sum(counted), len(counted)
    ww = last * (last + 1) // 2 - wp - pq
    for layer in range(gpt2.n_layers):
        whole = maps[layer][0].double().numpy()
        total = sum(made[name][layer] * n for name, n in (("s_wp", wp), ("s_pq", pq), ("s_ww", ww)))
        assert total == pytest.approx(np.tril(whole, -1).sum(), rel=1e-4)
        assert made["first"][layer] == pytest.approx(whole[1:, 0].sum())
        assert {tuple(e[:2]) for e in made["edges"][layer]} >= {
            (last, p) for p in counted if whole[last, p] > 0
        }


def test_template_asks_for_nothing_outside_itself():
    template = files("anchors.viewer").joinpath("page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in template
    assert re.findall(r"https?://[^\s\"']*", template) == ["http://www.w3.org/2000/svg"]
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|@import", template)
        == []
    )
