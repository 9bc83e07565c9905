"""The viewer's page: its pure parts, and the page itself in a real headless Chromium."""

import copy
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from anchors.viewer import render_page
from anchors.viewer.page import edges

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
        "s_wp": [0.6, 0.2, 0.0, 0.1, 0.1],
        "s_pq": [0.1, 0.6, 0.0, 0.7, 0.8],
        "s_ww": [0.3, 0.2, 0.0, 0.2, 0.1],
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
        ("edges", [[], [[2, 5, 0.1]], [], []], r"layer 1 holds \[2, 5, 0.1\]"),
        ("edges", [[], [], [], [[2, 1, 0]]], "w > 0"),
        ("layers", [0, 1, 2, 5], "holds 5; its sums have 5 layers"),
        ("s_ww", [0.5], r"\['s_ww'\] has 1 entries for 5 layers"),
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


def test_template_asks_for_nothing_outside_itself():
    template = files("anchors.viewer").joinpath("page.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in template
    assert re.findall(r"https?://[^\s\"']*", template) == ["http://www.w3.org/2000/svg"]
    assert (
        re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|@import", template)
        == []
    )


# ---- the page in a browser ----


FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Viewer:
    """One browser and the page that it shows."""

    def __init__(self, driver, folder: Path):
        self.driver, self.folder, self.opened = driver, folder, []

    def open(self, data: dict, fragment: str = "", size: tuple[int, int] = (1280, 900)) -> "Viewer":
        path = self.folder / f"page{len(self.opened)}.html"
        path.write_text(render_page(data), encoding="utf-8")
        self.opened.append(path.as_uri())
        self.resize(*size)
        self.driver.get(path.as_uri() + fragment)
        return self

    def resize(self, width: int, height: int) -> None:
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)

    def js(self, code: str, *values):
        return self.driver.execute_script(f"return {code}", *values)

    def settle(self) -> None:
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def until(self, code: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 5, 0.03).until(lambda _: self.js(code))

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def each(self, selector: str, what: str = "e.textContent") -> list:
        return self.js(f"[...document.querySelectorAll(arguments[0])].map(e => {what})", selector)

    def text(self, selector: str) -> str:
        return self.js("document.querySelector(arguments[0]).textContent", selector)

    @property
    def layer(self) -> str:
        return self.text("#at").split(" / ")[0]

    @property
    def arcs(self) -> set[tuple[int, int, str]]:
        found = self.each("#arcs path", "[+e.dataset.i, +e.dataset.j, e.getAttribute('class')]")
        return {(i, j, kind) for i, j, kind in found}


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver_path = shutil.which("chromedriver")
    if not chromium or not driver_path:
        pytest.skip("no chromium, or no chromedriver, on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(executable_path=driver_path))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start here: {error.msg}")
    driver.set_script_timeout(10)
    yield Viewer(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()


@pytest.fixture(autouse=True)
def quiet(request):
    """After every test in the browser: nothing on its console, nothing asked of any network."""
    if "viewer" not in request.fixturenames:
        yield
        return
    viewer = request.getfixturevalue("viewer")
    viewer.driver.get("data:,")
    viewer.driver.get_log("browser"), viewer.driver.get_log("performance")
    yield
    assert [entry["message"] for entry in viewer.driver.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in viewer.driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked
    assert {url for url in asked if not url.startswith("data:")} <= set(viewer.opened)


LAYER_0 = {(7, 2, "wp"), (7, 3, "wp"), (15, 11, "wp"), (11, 9, "ww"), (19, 2, "ww")}
LAYER_1 = {(22, 7, "pq"), (22, 15, "pq"), (7, 2, "wp"), (19, 17, "ww")}


def test_hostile_text_is_shown_and_never_run(viewer):
    data = payload()
    prompt = data["prompts"][0]
    prompt["tokens"][: len(HOSTILE)] = HOSTILE
    for field in ("title", "model", "task", "command"):
        data[field] = HOSTILE[0]
    data["provenance"] = {HOSTILE[1]: HOSTILE[0]}
    prompt["name"], prompt["labels"], prompt["notes"] = HOSTILE[0], HOSTILE[:2], HOSTILE[:2]
    viewer.open(data, "#prompt=1&layer=0")
    viewer.click("[data-i='0']")
    assert viewer.each("#text .token") == prompt["tokens"]
    assert viewer.js("window.pwned === undefined")
    assert viewer.js("[document.images.length, document.scripts.length]") == [0, 2]
    assert viewer.text("h1") == viewer.driver.title == HOSTILE[0]
    assert HOSTILE[1] in viewer.text("#notes")
    assert viewer.each(".ctl", "e.dataset.shown") == ["U+2028", "U+2029", "U+202E", "U+000D"]


def test_keys_and_slider_change_the_layer_and_its_arcs(viewer):
    from selenium.webdriver.common.keys import Keys

    viewer.open(payload(), "#prompt=1&layer=0")
    assert (viewer.layer, viewer.arcs) == ("0", LAYER_0)
    viewer.keys(Keys.ARROW_RIGHT)
    assert (viewer.layer, viewer.arcs) == ("1", LAYER_1)
    viewer.keys("k")
    assert (viewer.layer, viewer.arcs) == ("2", set())
    assert "no flow in this layer above zero" in viewer.text("#status")
    viewer.keys(Keys.END)
    assert (viewer.layer, viewer.arcs) == ("4", {(22, 7, "pq")})  # layer 3 has no arcs recorded
    viewer.keys(Keys.ARROW_RIGHT)
    assert viewer.layer == "4"
    viewer.keys("J", "j")
    assert viewer.layer == "1"
    viewer.keys(Keys.HOME, Keys.ARROW_LEFT)
    assert viewer.layer == "0"
    viewer.driver.find_element("id", "layer").send_keys(Keys.ARROW_RIGHT)  # one step: not the page's too
    assert (viewer.layer, viewer.arcs) == ("1", LAYER_1)
    assert viewer.js("document.querySelector('#sums tr.now').dataset.layer") == "1"


def test_token_isolates_its_arcs_and_escape_clears(viewer):
    from selenium.webdriver.common.keys import Keys

    viewer.open(payload(), "#prompt=1&layer=0")
    viewer.click("[data-i='2']")
    assert viewer.arcs == {(7, 2, "wp"), (19, 2, "ww")}
    assert "·good" in viewer.text("#picked h2")
    assert viewer.each("#picked tbody button") == ["·Positive", "·warm"]
    assert viewer.each(".token.near", "+e.dataset.i") == [2, 7, 19]
    viewer.keys(Keys.ARROW_RIGHT)
    assert viewer.arcs == {(7, 2, "wp")}
    viewer.keys(Keys.ESCAPE)
    assert (viewer.layer, viewer.arcs) == ("1", LAYER_1)
    assert viewer.js("document.getElementById('picked').hidden && !document.querySelector('.picked, .near')")
    viewer.js("document.querySelector('[data-i=\"21\"]').focus()")
    viewer.keys(Keys.TAB, Keys.ENTER)
    assert viewer.arcs == {(22, 7, "pq"), (22, 15, "pq")}
    viewer.click("#picked tbody button")  # its strongest source: the first label word
    assert viewer.arcs == {(22, 7, "pq"), (7, 2, "wp")}
    assert viewer.js("document.activeElement.dataset.i") == "7"  # the keyboard follows
    viewer.click("#close")
    assert viewer.arcs == LAYER_1
    viewer.click("[data-i='0']")
    assert (viewer.arcs, "touches this token" in viewer.text("#status")) == (set(), True)
    viewer.click("[data-i='0']")
    assert viewer.arcs == LAYER_1


def test_each_flow_can_be_hidden(viewer):
    viewer.open(payload(), "#prompt=1&layer=1")
    for kind in ("wp", "pq", "ww"):
        viewer.click(f".flow.{kind}")
        assert viewer.arcs == {arc for arc in LAYER_1 if arc[2] != kind}
        assert viewer.each(f".flow.{kind}", "e.getAttribute('aria-pressed')") == ["false"]
        viewer.click(f".flow.{kind}")
        assert viewer.arcs == LAYER_1
    for kind in ("wp", "pq", "ww"):
        viewer.click(f".flow.{kind}")
    assert (viewer.arcs, "no recorded arc" in viewer.text("#status")) == (set(), True)


def test_threshold_keeps_the_strongest_and_scale_spans_layers(viewer):
    from selenium.webdriver.common.keys import Keys

    viewer.open(payload(), "#prompt=1&layer=0")
    keep = viewer.driver.find_element("id", "keep")
    keep.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert (viewer.arcs, viewer.text("#kept")) == ({(7, 2, "wp"), (7, 3, "wp")}, "2")
    assert viewer.layer == "0"  # the keys belonged to the slider
    keep.send_keys(Keys.END)
    viewer.keys(Keys.TAB)
    viewer.js("location.hash = '#prompt=1&layer=4'")
    viewer.until("document.getElementById('at').textContent.startsWith('4')")
    width = "+document.querySelector('#arcs path').getAttribute('stroke-width')"
    alone = viewer.js(width)
    viewer.click("#scale")
    assert viewer.js(width) < alone  # 0.4 against the prompt's 0.9
    viewer.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)  # a check box holds no arrow keys back
    assert viewer.layer == "1"


def test_arcs_meet_their_tokens_after_the_window_changes(viewer):
    gap = """(() => { const path = document.querySelector('#arcs path[data-i="7"][data-j="2"]');
      const box = document.querySelector('[data-i="7"] .w').getBoundingClientRect();
      const end = path.getPointAtLength(path.getTotalLength());
      const home = document.getElementById('text').getBoundingClientRect();
      return Math.hypot(end.x + home.left - box.left - box.width / 2, end.y + home.top - box.top); })()"""
    viewer.open(payload(), "#prompt=1&layer=0")
    for width in (1280, 700, 380):
        viewer.resize(width, 800)
        viewer.settle(), viewer.settle()
        assert viewer.js(gap) < 1.5


def test_theme_button_turns_the_colours(viewer):
    viewer.open(payload())
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    brightness = f"{colour}.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0)"
    assert viewer.js(brightness) > 600
    viewer.click("#theme")
    assert (viewer.js(brightness) < 150, viewer.text("#theme")) == (True, "Light")
    viewer.click("#theme")
    assert (viewer.js(brightness) > 600, viewer.text("#theme")) == (True, "Dark")
    viewer.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        viewer.open(payload())
        assert (viewer.js(brightness) < 150, viewer.text("#theme")) == (True, "Light")
    finally:
        viewer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_narrow_window_does_not_scroll_sideways(viewer):
    data = payload()
    data["prompts"][0]["tokens"][:2] = ["x" * 90, HOSTILE[0]]
    data["prompts"][0]["name"] = "a very long name " * 8
    data["provenance"]["hash"] = "0" * 200
    data["title"] = "T" * 80
    viewer.open(data, size=(380, 800))
    viewer.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    viewer.click("[data-i='3']")
    viewer.settle()
    assert viewer.js("document.documentElement.scrollWidth <= 380 && document.body.scrollWidth <= 380")
    assert viewer.js("document.getElementById('picked').getBoundingClientRect().bottom <= innerHeight")


def test_prompt_picker_charts_and_link(viewer):
    viewer.open(payload(), "#prompt=2&layer=1")
    assert viewer.text("#notes") == "One <b>note</b>."
    assert viewer.js("document.getElementById('prompt').value") == "1"
    assert viewer.each("#bars > span") == ["Negativegold", "25.0 %", "Positivepredicted", "75.0 %"]
    assert "label words → target 60.0 %" in viewer.text("#chart .readout")
    assert viewer.js("document.querySelectorAll('#curves .band').length") == 3
    assert "20 examples" in viewer.text("#caption")
    click = """(() => { const chart = document.querySelector('#chart svg');
      const box = chart.getBoundingClientRect();
      chart.dispatchEvent(new MouseEvent('click', {clientX: box.right - 30, clientY: box.top + 20})); })()"""
    viewer.js(click)
    assert viewer.layer == "4"
    viewer.until("location.hash === '#prompt=2&layer=4'")
    viewer.click("#prompt option[value='0']")
    assert (viewer.layer, viewer.js("document.getElementById('notes').hidden")) == ("4", True)
    viewer.until("location.hash === '#prompt=1&layer=4'")
    assert viewer.text("#provenance") == "seed1torch2.11"


def test_play_steps_to_the_last_layer_and_stops(viewer):
    viewer.open(payload(), "#prompt=1&layer=2")
    viewer.click("#play")
    assert viewer.text("#play") == "Pause"
    viewer.until("document.getElementById('at').textContent.startsWith('4')")
    assert viewer.text("#play") == "Play"


def test_one_prompt_without_layers_or_curves(viewer):
    data = payload() | {"curves": None, "command": None}
    del data["prompts"][1]
    data["prompts"][0].update(layers=[], edges=[], gold=None, s_wp=[], s_pq=[], s_ww=[])
    viewer.open(data)
    assert viewer.js("document.getElementById('picker').hidden && document.getElementById('all').hidden")
    assert "No layer" in viewer.text("#status")
    viewer.click("[data-i='3']")
    viewer.keys("k")
    assert viewer.arcs == set()


def test_long_prompts_stay_quick(viewer):
    rng, length = np.random.default_rng(0), 1500
    data = payload()
    prompt = data["prompts"][0]
    prompt["tokens"] = [f" w{i}" for i in range(length)]
    prompt["roles"] = ["text"] * (length - 1) + ["target"]
    prompt["classes"] = [None] * length
    pairs = [sorted(rng.choice(length, 2, replace=False).tolist(), reverse=True) for _ in range(500)]
    flows = [[i, j, float(w)] for (i, j), w in zip(pairs, rng.random(500) + 0.1, strict=True)]
    prompt["edges"] = [flows] * 4
    viewer.open(data, "#prompt=1&layer=0")
    viewer.js(
        "(k => { k.value = k.max; k.dispatchEvent(new Event('input')); })(document.getElementById('keep'))"
    )
    assert len(viewer.each("#arcs path", "0")) == 300
    spent = viewer.js(
        """(() => { const start = performance.now(), slider = document.getElementById('layer');
        for (const at of [1, 2, 3]) {
          slider.value = at; slider.dispatchEvent(new Event('input')); document.body.offsetHeight;
        }
        return (performance.now() - start) / 3; })()"""
    )
    assert spent < 1000  # a few tens of milliseconds where nothing else runs
