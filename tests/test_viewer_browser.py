"""The viewer's page in a real headless Chromium."""

import csv
import io
import json
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_viewer import HOSTILE, payload

from anchors.viewer import render_page

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


def test_blocks_of_sparse_attention_follow_the_layer(viewer):
    data = payload()
    data["prompts"][0]["tokens"][: len(HOSTILE)] = HOSTILE
    chosen = [[[0, 1, 5], [0, 2, 5]], [[0, 3, 5], [0, 4, 5]], [[0, 5], [0, 5]], [[0, 1, 5], [0, 1, 5]]]
    data["prompts"][0]["blocks"] = {"size": 4, "count": 6, "forced": [0, 5], "chosen": chosen}
    viewer.open(data, "#prompt=1&layer=0")
    assert viewer.each("#groups p") == ["Group 0: chose 1", "Group 1: chose 2"]
    assert viewer.each("#groups .strip:nth-of-type(1) .chosen", "+e.dataset.j") == [1, 2]
    assert viewer.each("#groups > :first-child .always", "+e.dataset.j") == [0, 5]
    assert viewer.each("#groups > :first-child .anchor", "+e.dataset.j") == [1, 3]
    assert HOSTILE[0] in viewer.each("#groups .strip span", "e.title")[0]
    assert viewer.js("window.pwned === undefined && document.images.length === 0")
    viewer.click("#groups [data-j='3']")
    assert viewer.each(".token.picked", "+e.dataset.i") == [12]
    viewer.keys("k", "k")
    assert viewer.each("#groups p") == ["Group 0: chose none", "Group 1: chose none"]
    viewer.open(data, "#prompt=2&layer=0")
    assert viewer.js("document.getElementById('read').hidden")


def test_only_the_counted_token_of_a_label_word_is_label_flow(viewer):
    """A label word of two tokens under the policy `first`: what the target reads at its second one is no part of S_pq."""
    data = payload()
    prompt = data["prompts"][0]
    prompt["tokens"][7:9] = [" Posi", "tive"]
    prompt["roles"][8] = "label"
    prompt["edges"][1] = [[22, 8, 0.9], [22, 7, 0.8], [8, 2, 0.3], [7, 2, 0.2]]
    prompt["s_pq_rest"] = [0.0, 0.9, 0.0, 0.0, 0.0]
    prompt["s_wp"][4] = 0.0
    data["curves"]["s_pq_rest"] = {
        "mean": [0.0, 0.61, 0.1],
        "low": [0.0, 0.55, 0.0],
        "high": [0.0, 0.66, 0.2],
    }
    data["curves"]["s_wp"] = {name: [*values[:2], None] for name, values in data["curves"]["s_wp"].items()}
    viewer.open(data, "#prompt=1&layer=1")
    assert viewer.arcs == {(22, 8, "ww"), (22, 7, "pq"), (8, 2, "ww"), (7, 2, "wp")}
    assert "60.0 % of the flow from label words to the target" in viewer.text("#left")  # 0.9 / (0.9 + 0.6)
    assert "61.0 % [55.0 %, 66.0 %]" in viewer.text("#left-all")
    assert viewer.each(".token.counted", "+e.dataset.i") == [7, 15]
    assert viewer.each(".token.rest", "e.title") == ["8 · label word, this token not counted"]
    border = "getComputedStyle(document.querySelector(arguments[0]).querySelector('.w')).borderBottomStyle"
    assert [viewer.js(border, f".token[data-i='{i}']") for i in (7, 8)] == ["none", "dotted"]
    viewer.keys("k", "k")
    assert (viewer.layer, viewer.text("#chart .readout .wp")) == ("4", "words → label words not defined here")
    assert viewer.each("#sums tr:last-child td")[0] == "–"
    viewer.keys("j")
    assert "words → label words not defined here" in viewer.text("#curves .readout")
    viewer.open(payload(), "#prompt=1&layer=1")
    assert viewer.js("document.getElementById('left').hidden && document.getElementById('left-all').hidden")


def test_positions_that_are_no_label_words_are_the_ones_that_count(viewer):
    """The control `random-positions`: S_pq is about other tokens, and so are the arcs of its colour."""
    data = payload()
    prompt = data["prompts"][0]
    prompt["classes"][7] = prompt["classes"][15] = None
    prompt["classes"][3], prompt["classes"][11] = 1, 0
    prompt["edges"][1] = [[22, 7, 0.8], [22, 11, 0.6], [3, 2, 0.2]]
    viewer.open(data, "#prompt=1&layer=1")
    assert viewer.arcs == {(22, 7, "ww"), (22, 11, "pq"), (3, 2, "wp")}


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
    keep.send_keys(Keys.HOME)  # one of each flow
    assert (viewer.arcs, viewer.text("#kept")) == ({(7, 2, "wp"), (11, 9, "ww")}, "1")
    keep.send_keys(Keys.ARROW_RIGHT)
    assert viewer.arcs == LAYER_0 - {(15, 11, "wp")}
    assert viewer.layer == "0"  # the keys belonged to the slider
    keep.send_keys(Keys.END)
    viewer.keys(Keys.TAB)
    viewer.js("location.hash = '#prompt=1&layer=4'")
    viewer.until("document.getElementById('at').textContent.startsWith('4')")
    width = "+document.querySelector('#arcs path').getAttribute('stroke-width')"
    alone = viewer.js(width)
    viewer.click("#scale option[value='prompt']")
    assert viewer.js(width) < alone  # 0.4 against the prompt's 0.9
    viewer.js("document.activeElement.blur()")
    viewer.keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert viewer.layer == "1"


def test_each_flow_has_a_scale_of_its_own(viewer):
    viewer.open(payload(), "#prompt=1&layer=0")
    widest = """Object.fromEntries(['wp', 'ww'].map(kind => [kind,
      Math.max(...[...document.querySelectorAll(`#arcs path.${kind}`)].map(e => +e.getAttribute('stroke-width')))]))"""
    assert viewer.js(widest) == {"wp": 5.3, "ww": 5.3}
    viewer.click("#scale option[value='layer']")
    assert viewer.js(widest) == {"wp": 5.3, "ww": round(0.7 + 4.6 * 0.2 / 0.9, 2)}


def with_sink(data: dict) -> dict:
    """Arcs from the first token that drown all others in the layer 0; half of its flow."""
    prompt = data["prompts"][0]
    prompt["edges"][0] = [[5, 0, 9.0], [7, 0, 2e-5], *prompt["edges"][0]]
    wp, pq = 7 + 15, 2
    prompt["first"][0] = (0.6 * wp + 0.1 * pq + 0.3 * (22 * 23 // 2 - wp - pq)) / 2
    return data


def test_the_first_token_is_hidden_or_damped_and_the_page_says_so(viewer):
    viewer.open(with_sink(payload()), "#prompt=1&layer=0")
    assert viewer.arcs == LAYER_0
    said = "2 arcs from the first token, up to 9; all that leaves it is 50.0 % of the flow in this layer"
    assert f"Hidden: {said}" in viewer.text("#status")
    width = "+document.querySelector('#arcs path[data-i=\"11\"]').getAttribute('stroke-width')"
    faint = "+document.querySelector('#arcs path[data-j=\"0\"]').getAttribute('stroke-opacity')"
    free = viewer.js(width)
    viewer.keys("f")
    assert viewer.arcs == LAYER_0 | {(5, 0, "ww"), (7, 0, "wp")}
    assert f"Damped, and outside of the scale: {said}" in viewer.text("#status")
    assert (viewer.js(width), viewer.js(faint) < 0.25) == (free, True)
    viewer.keys("f")
    assert (viewer.js(width) < free / 2, "first token" in viewer.text("#status")) == (True, False)
    viewer.keys("f")
    assert viewer.arcs == LAYER_0
    viewer.click("[data-i='0']")  # asked for by name it is shown
    assert viewer.arcs == {(5, 0, "ww"), (7, 0, "wp")}
    assert "2×10⁻⁵" in viewer.text("#picked")  # no exponent that a line could break
    assert set(viewer.each("td:not(.wrap)", "getComputedStyle(e).whiteSpace")) == {"nowrap"}


def test_single_arcs_stand_beside_the_average_of_their_flow(viewer):
    viewer.open(payload(), "#prompt=1&layer=1")
    assert viewer.each("#list .mean[data-kind='pq'] td") == ["0.6", "1×"]
    pairs = viewer.each("#list .wrap")
    total = 0.2 * 22 + 0.6 * 2 + 0.2 * 229
    assert pairs == [
        f"average of {n} pairs, {100 * n * mean / total:.1f} % of all flow" for n, mean in ((22, 0.2), (2, 0.6), (229, 0.2))
    ]  # fmt: skip
    rows = viewer.each(
        "#list tr[data-i]", "[+e.dataset.i, +e.dataset.j, e.cells[1].textContent, e.cells[2].textContent]"
    )
    assert rows == [
        [7, 2, "0.2", "1×"],
        [22, 7, "0.8", "1.3×"],
        [22, 15, "0.6", "1×"],
        [19, 17, "0.1", "0.5×"],
    ]
    viewer.click("#list tr[data-i='22'] button")
    assert viewer.each(".token.picked", "+e.dataset.i") == [7]
    assert "22, 2, 229 pairs" in viewer.text("#pairs")


def test_values_appear_under_the_pointer(viewer):
    viewer.open(payload(), "#prompt=1&layer=1")
    free = """(selector => { const path = document.querySelector(selector), end = path.getTotalLength();
      const home = path.ownerSVGElement.getBoundingClientRect();
      return Array.from({length: 99}, (_, n) => path.getPointAtLength(end * n / 99)).map(p => [p.x + home.left, p.y + home.top])
        .find(([x, y]) => !document.elementFromPoint(x, y).closest('.token')); })(arguments[0])"""
    for aim, said in (
        ("#arcs path[data-i='19']", "·warm"),
        ("#arcs path[data-i='22'][data-j='15']", "label words → target: 0.6, 1× the average pair"),
    ):
        x, y = viewer.js(free, aim)
        viewer.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        viewer.until("!document.getElementById('tip').hidden")
        assert said in viewer.text("#tip")
    viewer.js("document.querySelector('#curves svg').scrollIntoView({block: 'center'})")
    x, y = viewer.js(
        "(r => [r.left + 40, r.top + 40])(document.querySelector('#curves svg').getBoundingClientRect())"
    )
    viewer.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    viewer.until("document.getElementById('tip').textContent.startsWith('Layer 0')")
    assert "label words → target 50.0 % [40.0 %, 60.0 %]" in viewer.text("#tip")


def right_arcs(viewer) -> set[tuple[int, int, str]]:
    found = viewer.each("#arcs2 path", "[+e.dataset.i, +e.dataset.j, e.getAttribute('class')]")
    return {(i, j, kind) for i, j, kind in found}


def test_two_layers_or_two_prompts_stand_side_by_side(viewer):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    viewer.open(payload(), "#prompt=1&layer=0")
    viewer.keys("b")
    assert (viewer.arcs, right_arcs(viewer)) == (
        LAYER_0,
        {(22, 7, "pq")},
    )  # the deepest layer beside a shallow one
    tops = viewer.each(".prompttext", "e.getBoundingClientRect().top")
    assert tops[0] == pytest.approx(tops[1], abs=1)
    for _ in range(2):
        ActionChains(viewer.driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(
            Keys.SHIFT
        ).perform()
    viewer.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (viewer.layer, viewer.text("#at2")) == ("2", "1 / 4")
    assert (viewer.arcs, right_arcs(viewer)) == (set(), LAYER_1)
    assert "Layer 1: 4 of 4" in viewer.text("#status2")
    viewer.click("#text2 [data-i='17']")  # one prompt, one token in both
    assert viewer.each(".token.picked", "+e.dataset.i") == [17, 17]
    assert right_arcs(viewer) == {(19, 17, "ww")}
    viewer.click("#prompt2 option[value='1']")
    assert viewer.each(".token.picked", "+e.dataset.i") == [17]
    viewer.click("#text2 [data-i='15']")
    assert viewer.each(".token.picked", "[e.closest('.prompttext').id, +e.dataset.i]") == [["text2", 15]]
    viewer.until("location.hash === '#prompt=1&layer=2&beside=2:1:15'")
    viewer.js("document.activeElement.blur()")
    viewer.keys("b")
    assert viewer.js("document.getElementById('pane2').hidden")


def copied(viewer) -> str:
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    viewer.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    return viewer.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")


def test_the_link_holds_all_that_is_set(viewer):
    viewer.open(with_sink(payload()), "#prompt=1&layer=0")
    viewer.click(".flow.pq")
    viewer.click("#scale option[value='layer']")
    viewer.click("#first option[value='shown']")
    viewer.js("(k => { k.value = 3; k.dispatchEvent(new Event('input')); })(document.getElementById('keep'))")
    viewer.click(".token[data-i='7']")
    viewer.click("#beside")
    viewer.click("#link")
    viewer.until("document.getElementById('done').textContent === 'Copied: the link.'")
    link, kept = copied(viewer), (viewer.arcs, right_arcs(viewer))
    parts = "prompt=1&layer=0&token=7&flows=wp,ww&arcs=3&scale=layer&first=shown&beside=1:4"
    assert link == f"{viewer.opened[-1]}#{parts}"
    assert kept == ({(7, 0, "wp"), (7, 2, "wp"), (7, 3, "wp")}, set())
    viewer.driver.get("data:,")
    viewer.driver.get(link)
    assert (viewer.arcs, right_arcs(viewer)) == kept
    assert viewer.each(".token.picked", "+e.dataset.i") == [7, 7]
    assert [viewer.js(f"document.getElementById('{name}').value") for name in ("scale", "first", "keep")] == [
        "layer", "shown", "3",
    ]  # fmt: skip
    viewer.until(f"location.hash === '#{parts}'")
    for wrong in (
        "token=99&arcs=x&scale=no&first=&beside=9:9",
        "flows=no&arcs=0&beside=",
        "prompt=-1&layer=1e9",
    ):
        viewer.driver.get("data:,")
        viewer.driver.get(f"{viewer.opened[-1]}#{wrong}")
        assert viewer.text("#status")


def test_arcs_are_copied_as_csv_with_every_digit(viewer):
    data = payload()
    prompt = data["prompts"][0]
    prompt["tokens"][7], prompt["tokens"][2], prompt["name"] = ' Posi",tive', "\n", "a, b"
    viewer.open(data, "#prompt=1&layer=1&beside=2:0")
    viewer.keys("c")
    viewer.until("document.getElementById('done').textContent === 'Copied: 9 arcs.'")
    rows = list(csv.DictReader(io.StringIO(copied(viewer), newline="")))
    assert {
        (int(r["receiver"]), int(r["source"]), r["flow"][2:]) for r in rows if r["prompt"] == "a, b"
    } == LAYER_1
    assert rows[0] == {
        "prompt": "a, b", "layer": "1", "flow": "s_pq", "source": "7", "source_token": ' Posi",tive', "receiver": "22",
        "receiver_token": ":", "value": "0.8", "average_of_flow": "0.6", "pairs_of_flow": "2",
    }  # fmt: skip
    assert {r["source_token"] for r in rows if r["source"] == "2"} == {"\n", " good"}


def test_what_is_seen_is_saved_as_svg_and_as_png(viewer, tmp_path):
    data = payload()
    data["prompts"][0]["tokens"][: len(HOSTILE)] = HOSTILE
    data["title"] = "\ud800 <Flow> & more"
    for way, size in (("light", 900), ("dark", 380)):
        viewer.open(data, "#prompt=1&layer=1&beside=2:0", size=(size, 800))
        viewer.js(f"document.documentElement.dataset.theme = '{way}'")
        viewer.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / way)}
        )
        viewer.keys("s", "n")
        made, picture = ((tmp_path / way / f"flow-prompt1-layer1.{end}") for end in ("svg", "png"))
        for _ in range(100):
            if made.exists() and picture.exists():
                break
            time.sleep(0.05)
        root = ElementTree.parse(made).getroot()  # noqa: S314 - written here
        space = "{http://www.w3.org/2000/svg}"
        assert len(root.findall(f".//{space}path")) == len(LAYER_0) + len(LAYER_1)
        pieces = [text.text for text in root.iter(f"{space}text")]
        words, unbroken = (
            " ".join(pieces),
            "".join(pieces),
        )  # a long word stands on several lines where fonts are wide
        wanted = ("<Flow>", "</script><script>window.pwned=1</script>", "warm", "layer 0", "U+202E")
        assert not [word for word in wanted if word not in unbroken]
        assert all("\U0001f469" in piece for piece in pieces if "\u200d" in piece)  # no letter is torn
        assert "Thickness: of each flow, this layer." in words
        width, height = (float(root.get(side)) for side in ("width", "height"))
        with Image.open(picture) as drawn:
            assert drawn.size == (round(2 * width), round(2 * height))
            assert (np.asarray(drawn.convert("L"))[0, 0] > 128) == (way == "light")
            assert len(drawn.convert("RGB").getcolors(1 << 24)) > 50
    assert viewer.js("window.pwned === undefined")


NEAR = """(() => { const spots = [...document.querySelectorAll(arguments[0])].map(path => { const end = path.getTotalLength();
    return Array.from({length: 40}, (_, n) => path.getPointAtLength(end * (n + 10) / 60)); });
  let least = Infinity;
  spots.forEach((a, n) => spots.slice(0, n).forEach(b => {
    const apart = a.map(p => Math.min(...b.map(q => Math.hypot(p.x - q.x, p.y - q.y))));
    least = Math.min(least, apart.sort((x, y) => x - y)[20]); }));
  return [spots.length, least]; })()"""
"""Of all pairs of arcs the smallest median distance, away from their ends."""


@pytest.mark.parametrize("between", [" ", "\n"])
def test_arcs_of_label_words_lie_apart_on_one_line_and_below_each_other(viewer, between):
    data = payload()
    labels, count = range(1, 16, 2), 18
    tokens = ["a", *(" Yes" if i in labels else between for i in range(1, count - 1)), ":"]
    data["prompts"] = [
        data["prompts"][0] | {
            "tokens": tokens, "roles": ["text"] * (count - 1) + ["target"],
            "classes": [1 if i in labels else None for i in range(count)],
            "edges": [[[count - 1, i, 0.5] for i in labels]] * 4,
        }
    ]  # fmt: skip
    viewer.open(data, "#prompt=1&layer=0")
    found, apart = viewer.js(NEAR, "#arcs path.pq")
    assert (found, apart > 3.5) == (8, True), apart


def test_the_page_explains_itself_with_its_own_numbers(viewer):
    viewer.open(with_sink(payload()), "#prompt=1&layer=0")
    assert viewer.js("document.getElementById('reading').hidden")
    viewer.keys("h")
    assert viewer.js("document.activeElement.id") == "reading"
    assert "the average of 22 pairs, Spq of 2, Sww of 229" in viewer.text("#counts")
    assert "In layer 0 50.0 % of all flow leaves it" in viewer.text("#sink")
    assert "·good (2) → ·Positive (7); words → label words: 0.9, 1.5× the average" in viewer.text("#example")
    viewer.click("#how")
    assert viewer.js("document.getElementById('reading').hidden")


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
    data["prompts"][0].update(
        layers=[], edges=[], first=[], gold=None, s_wp=[], s_pq=[], s_ww=[], s_pq_rest=[]
    )
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
    prompt["classes"][700] = 1
    pairs = [sorted(rng.choice(length, 2, replace=False).tolist(), reverse=True) for _ in range(500)]
    pairs += [[700, j] for j in range(1, 300)]
    flows = [[i, j, float(w)] for (i, j), w in zip(pairs, rng.random(len(pairs)) + 0.1, strict=True)]
    prompt["edges"] = [flows] * 4
    viewer.open(data, "#prompt=1&layer=0")
    viewer.js(
        "(k => { k.value = k.max; k.dispatchEvent(new Event('input')); })(document.getElementById('keep'))"
    )
    assert len(viewer.each("#arcs path", "0")) == 200
    spent = viewer.js(
        """(() => { const start = performance.now(), slider = document.getElementById('layer');
        for (const at of [1, 2, 3]) {
          slider.value = at; slider.dispatchEvent(new Event('input')); document.body.offsetHeight;
        }
        return (performance.now() - start) / 3; })()"""
    )
    assert spent < 1000  # a few tens of milliseconds where nothing else runs


def test_the_page_of_any_text_in_a_browser(viewer, gpt2):
    from test_aims import mapped, plain

    from anchors.viewer.payload import payload as whole
    from anchors.viewer.payload import prompt_payload

    prompt = plain(gpt2, "the", "and")
    shown = prompt_payload(gpt2, None, prompt, "a", gpt2.layers)
    viewer.open(whole("Information flow", gpt2, None, [shown], {}), "#layer=1&arcs=5")
    viewer.settle()
    assert viewer.each("#flows button") == ["tokens → target", "other"]
    assert viewer.text("#answers") == "Likely next tokens"
    assert sorted(viewer.each("#bars .aim")) == ["against", "aimed at"]
    q = prompt.target
    into = {(i, j) for i, j, kind in viewer.arcs if kind == "tq"}
    right = sorted(range(1, q), key=lambda j: -float(mapped(gpt2, prompt)[0][1, q, j]))[:5]
    assert into == {(q, j) for j in right}
    assert {kind for _, _, kind in viewer.arcs} == {"tq", "ww"}
    assert "Share of the two flows" in viewer.js(
        "document.querySelector('#chart svg').getAttribute('aria-label')"
    )
    viewer.keys("h")
    assert not viewer.js("document.getElementById('of-target').hidden")
    for other in ("of-words", "of-labels", "of-pictures", "intos"):
        assert viewer.js("document.getElementById(arguments[0]).hidden", other)
    assert "label word" not in viewer.text("#legend")
    viewer.keys("k")
    assert viewer.layer == "2"
    assert viewer.text("#status").startswith("Layer 2: ")
