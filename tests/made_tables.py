"""Every figure, and every table that a verb prints, from made rows: what `docs/contact_sheet.py` shows and tests measure."""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from made_rows import (
    aimed,
    attended,
    classified,
    compressed,
    diagnosed,
    isolated,
    mapped,
    reweighted,
    rows,
    summary,
    timed,
    worded,
)
from matplotlib.figure import Figure

from anchors.figures import draw, generic, nsa_bench, nsa_train
from anchors.places import titled
from anchors.study.registry import study
from anchors.study.report import Report
from anchors.study.results import read_table
from anchors.summaries import SUMMARIES

TREC = ("Abbreviation", "Entity", "Description", "Person", "Location", "Number")
MODEL = "/data/models/SmolLM2-360M-Instruct-tuned-on-reviews/checkpoint-12000"
"""A path, as a model of one's own is named."""
EXPERTS = ("instruction", "crosslingual", "mathematics")


def both(records: list, more: list | None = None) -> pd.DataFrame:
    """Rows of two tasks."""
    parts = [rows(records, "sst2"), rows(records if more is None else more, "my-reviews-of-films")]
    return pd.concat(parts, ignore_index=True)


def patched(layers: int = 12) -> list[tuple]:
    """A patch whose effect is released in the middle layers."""
    rng = np.random.default_rng(6)
    return [
        (n, condition, layer, metric, height * (layer < layers // 2) + rng.normal(0, 0.05))
        for n in range(6)
        for condition, height in (("label", 1.0), ("random", 0.1), ("others", 0.4))
        for layer in range(layers)
        for metric in (("follow", "released") if condition == "label" else ("follow",))
    ]


@cache
def tables(kind: str) -> dict[str, pd.DataFrame]:
    """The tables of a kind of rows."""
    made: dict[str, Callable[[], pd.DataFrame]] = {
        "classify": lambda: both(classified(TREC, prompts=60)),
        "isolate": lambda: both(isolated((1, 3, 5))),
        "readout": lambda: both(attended([0, 1] * 8, layers=12)),
        "reweight": lambda: both(reweighted(TREC, 12, 9), reweighted(("Negative", "Positive"), 12, 9)),
        "compress": lambda: both(compressed()),
        "speed": lambda: both(timed()),
        "diagnose": lambda: rows(diagnosed(TREC), "trec"),
        "words": lambda: rows(worded([" good", " bad", " great", " terrible", " a", " nice"])),
        "map": lambda: rows(mapped(*_prompt(3))),
        "flow_prompts": lambda: rows(aimed(_prompt(2)[0][:-1], 12, 5, " Negative"), "questions-of-my-own"),
    }
    if kind == "flow":
        return {"summary": summary(("sst2", "my-reviews-of-films"), layers=12)}
    if kind == "causal":
        shown = summary(("sst2", "my-reviews-of-films"), layers=12)
        flows = shown.rename(columns={"share": "mean", "share_low": "low", "share_high": "high"})
        return _causal() | {"flow": flows}
    if kind == "nsa_probe":
        found = committed("nsa/probe/nsa-0", "nsa_probe")
        return found | {"summary": found["summary"].assign(chance=0.25)}
    if kind == "inject-sweep":
        return _swept()
    if kind == "inject-flow":
        return _injected()
    return SUMMARIES[kind](made[kind]())


def _causal() -> dict[str, pd.DataFrame]:
    own = both(patched())
    grouped = own.groupby(["task", "condition", "metric", "layer"], as_index=False)["value"].mean()
    spread = grouped.assign(low=grouped["value"] - 0.07, high=grouped["value"] + 0.07, examples=6, seeds=1)
    return {"summary": spread.assign(shots=1, control="none", interval="bootstrap")}


def _prompt(demonstrations: int) -> tuple[list[str], list[str]]:
    words, roles = [], []
    for n in range(demonstrations):
        words += [
            "Review",
            ":",
            " a",
            " fine",
            " film",
            "\n",
            "Sentiment",
            ":",
            (" Positive", " Negative")[n % 2],
            "\n",
        ]
        roles += ["format"] * 2 + ["text"] * 3 + ["format"] * 3 + ["label", "format"]
    return [*words, "Review", ":", " dull", "\n", "Sentiment", ":"], [
        *roles,
        "format",
        "format",
        "text",
        "format",
        "format",
        "target",
    ]


EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def committed(folder: str, stem: str) -> dict[str, pd.DataFrame]:
    """The tables of a run that lies among the experiments."""
    found = sorted((EXPERIMENTS / folder).glob(f"{stem}*.parquet"))
    return {path.stem.removeprefix(stem).lstrip("_-"): read_table(path)[0] for path in found}


def _swept() -> dict[str, pd.DataFrame]:
    found = committed("injection/sweep-135m", "inject_sweep")
    best = found["best"]
    kept = {f"vision_kept{end}": best[f"vision{end}"] for end in ("", "_low", "_high")}
    return found | {"best": best.assign(split="test", kept=best.index > 0, **kept), "guessing": _guessing()}


def _guessing() -> pd.DataFrame:
    return pd.DataFrame(
        {"scenario": ["vision", *EXPERTS], "chance": 0.25, "majority": [0.3, 0.28, 0.41, 0.33]}
    )


def _injected() -> dict[str, pd.DataFrame]:
    """Those of the committed run; what it keeps no file of is added up from what it does."""
    found = committed("injection/flow", "flow")
    layers, keys = found["layers"], ["scenario", "labels", "expert", "strength", "measure", "metric"]
    middle, halves = layers["layer"].max() // 2, []
    for part, own in (
        ("all", layers),
        ("shallow", layers[layers["layer"] <= middle]),
        ("deep", layers[layers["layer"] > middle]),
    ):
        shares = own.groupby(keys, as_index=False)[["value", "low", "high"]].mean()
        halves.append(shares.assign(part=part))
    flow = pd.concat(halves, ignore_index=True)
    before = flow[flow["expert"] == "none"].set_index(["scenario", "labels", "measure", "metric", "part"])[
        "value"
    ]
    first = before.reindex(
        pd.MultiIndex.from_frame(flow[["scenario", "labels", "measure", "metric", "part"]])
    ).to_numpy()
    flow = flow.assign(
        change=flow["value"] / first - 1,
        change_low=flow["low"] / first - 1,
        change_high=flow["high"] / first - 1,
    )
    vision = flow[
        (flow["scenario"] == "vision")
        & (flow["labels"] == "gold")
        & (flow["strength"] > 0)
        & flow["metric"].isin(["s_ip", "s_iq"])
    ]
    points = vision.assign(lost=-vision["change"], drop=0.4 * vision["strength"] - 0.1)
    return found | {"strengths": flow, "points": points, "guessing": _guessing()}


def _timings() -> pd.DataFrame:
    return pd.DataFrame([
        {"implementation": name, "part": part, "direction": direction, "tokens": tokens, "shape": "64/4 D128", "pattern": "chosen",
         "ms": tokens**power / 3e4, "iqr": 0.02, "tflops": 123.4, "gigabytes": 12.3, "error": 3.2e-3, "deterministic": True,
         "note": "disagrees with the equations by 0.12: not timed" if name == "fla" else ""}
        for name, part, power in (("ours", "all", 1.1), ("sdpa-flash", "full", 1.7), ("fla", "slc", 1.2), ("xunhaolai", "slc", 1.3))
        for direction in ("forward", "backward")
        for tokens in (4096, 16384, 65536)
    ])  # fmt: skip


def _log() -> pd.DataFrame:
    found = []
    for run, speed in (("nsa attention", 1.0), ("full attention", 1.4)):
        for seed in range(2):
            for step in range(0, 500, 100):
                loss = 2.5 / (1 + speed * step / 200) + 0.1 * seed
                found += [
                    (run, seed, step, split, "label_loss", "all", loss) for split in ("train", "held_out")
                ]
                for at, bucket in enumerate(("all", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127")):
                    found.append(
                        (
                            run,
                            seed,
                            step,
                            "held_out",
                            "accuracy",
                            bucket,
                            min(0.95, 0.1 * at + speed * step / 1000),
                        )
                    )
                    found.append((run, seed, step, "held_out", "knowable", bucket, min(1, 0.15 * at)))
    return pd.DataFrame(found, columns=["run", "seed", "step", "split", "metric", "bucket", "value"])


def figures() -> dict[str, Figure]:
    """Every figure of every kind, by name."""
    made: dict[str, Any] = {
        kind: draw(kind, tables(kind), MODEL)
        for kind in (
            "flow",
            "classify",
            "isolate",
            "readout",
            "reweight",
            "compress",
            "speed",
            "diagnose",
            "causal",
            "map",
            "words",
            "flow_prompts",
        )
    }
    one = {
        "classify": classified(("no", "yes")),
        "isolate": isolated(),
        "diagnose": diagnosed(("no", "yes", "so so"), (5, 10, 20)),
        "map": mapped(*_prompt(10)),
    }
    made |= {f"{kind}, small": draw(kind, SUMMARIES[kind](rows(own)), MODEL) for kind, own in one.items()}
    made["map, long"] = made.pop("map, small")
    made["plain"] = generic.draw({"summary": tables("compress")["summary"]}, titled(MODEL))
    made["plain, layers"] = generic.draw({"summary": _causal()["summary"]}, titled(MODEL))
    made["nsa probe"] = draw("nsa_probe", tables("nsa_probe"), MODEL)
    made["nsa bench"] = nsa_bench.draw(_timings(), "64/4 D128")
    made["nsa train"] = nsa_train.draw({"log": _log()}, "")
    for name in ("inject-sweep", "inject-flow"):
        own = draw(name, tables(name), MODEL).items()
        made |= {f"{name}, {key}": figure for key, figure in own if not key.endswith("_odds")}
    return made


def shown() -> dict[str, list[Any]]:
    """What every verb prints to the console, by verb."""
    facts = {"model": MODEL, "parts": [{"examples": 60, "recipe": {"method": "task-arithmetic"}}]}
    found: dict[str, list[Any]] = {}
    for name in (
        "flow",
        "flow_prompts",
        "classify",
        "isolate",
        "readout",
        "reweight",
        "compress",
        "diagnose",
        "causal",
        "nsa_probe",
        "inject-sweep",
        "inject-flow",
    ):
        own = _printable(name)
        found[name.replace("-", " ").replace("_", " ")] = list(
            _parts(study(name), Report(own, [], [], facts))
        )
    return found | _plain()


def _parts(line: Any, result: Report) -> Iterable[Any]:
    from anchors.cli.verb import plainly_shown

    view = line.resolve(line.view)() if line.view else None
    return line.resolve(line.shown)(result, view) if line.shown else plainly_shown(line, result)


def _printable(name: str) -> dict[str, pd.DataFrame]:
    if name == "flow":
        return {"summary": _flowed()}
    return tables(name) | ({"speed": tables("speed")["summary"]} if name == "compress" else {})


def _flowed() -> pd.DataFrame:
    """With S_pq over tokens that are not counted, and a last layer where S_wp is not defined."""
    from anchors.stats import REST, UNDEFINED

    own = summary(("sst2",), layers=12)
    rest = own[own["metric"] == "s_pq"].assign(metric=REST)
    own = pd.concat([own, rest], ignore_index=True)
    own = own.assign(mean=own["share"] / 90, low=own["share_low"] / 90, high=own["share_high"] / 90, note="")
    own.loc[(own["layer"] == 11) & (own["metric"] == "s_wp"), "note"] = UNDEFINED
    return own


def _plain() -> dict[str, list[Any]]:
    """Tables of verbs that are no studies."""
    from anchors.certificate.agreement import Finding
    from anchors.cli import check, common, inject_demo, inject_show, ls, nsa, nsa_bench, run
    from anchors.experiments import CATALOGUE
    from anchors.injection.demo.build import Built
    from anchors.injection.merging.inspection import Inspection
    from anchors.injection.merging.methods import METHODS
    from anchors.injection.merging.recipe import Recipe
    from anchors.nsa.training.train import Trained
    from anchors.study.cost import Peak
    from anchors.study.plan import Outlook

    findings = [Finding("logits", True, "largest difference 3.1e-06 of 12.3, on prompts of 33 to 412 tokens"),
                Finding("what the model sees beyond position 8191 of its context", None, "not asked: no prompt is as long")]  # fmt: skip
    numbers = dict.fromkeys(("norm_vlm", "norm_expert", "norm_base"), 123.4) | dict.fromkeys(
        ("cosine", "conflicts", "zeros_vlm", "zeros_expert"), 0.123
    )
    inspected = Inspection.__new__(Inspection)
    for name, value in (
        ("layers", pd.DataFrame([{"layer": n, **numbers} for n in range(3)])),
        ("total", numbers),
    ):
        object.__setattr__(inspected, name, value)
    planned = [
        {"name": f"model.layers.{n}.self_attn.q_proj.weight", "vlm": f"model.language_model.layers.{n}.self_attn.q_proj.weight",
         "base": f"model.layers.{n}.self_attn.q_proj.weight", "expert": "", "layer": n, "kind": "attention", "shape": [576, 576], "change": "yes"}
        for n in range(30)
    ]  # fmt: skip
    built = {
        name: Built(Path("demo"), {"seconds": 123.0, "seen": dict.fromkeys(("vision", *EXPERTS), 0.87)})
        for name in ("vlm", *EXPERTS)
    }
    both_ = pd.DataFrame(
        {
            "task": ["sst2", "trec"],
            "condition": "first-5/label",
            "metric": "label_loyalty",
            "GPT2-XL": 0.71,
            "GPT-J": 0.63,
            "value": 0.62,
            "low": 0.55,
            "high": 0.69,
        }
    )
    peak = Peak(*(int(n * 1e9) for n in (1.6, 0.2, 0.1, 0, 0.08, 0.02, 0)))
    outlook = [
        Outlook("isolate", task, 1, "none", 1000, 640, 123456, 3723.0, 12.3e12, peak, "11 × 46 + 398")
        for task in ("sst2", "my-reviews-of-films")
    ]
    return {
        "check": [check.table(findings, f"{MODEL}, float32 on cpu")],
        "ls": [ls.table(ls.lines(Path("results")), Path("results"))],
        "run --compare": [run._compared(CATALOGUE["table1"], both_)],
        "run --dry-run": [common.outlook_table({"figure4": outlook, "figure8": outlook})],
        "nsa bench": [nsa_bench._shown("nsa-bench", _timings())],
        "nsa train": [nsa._table(Trained(Path("nsa"), _log()[lambda t: t["run"] == "nsa attention"], {}), "nsa attention")],
        "inject --methods": [inject_show.methods(METHODS)],
        "inject --dry-run": [inject_show.plan_table(planned, Recipe())],
        "inject --inspect": [inject_show.inspection(inspected, "SmolVLM-256M, SmolLM2-135M-maths")],
        "inject demo": [inject_demo._table(built, "The miniature")],
    }  # fmt: skip
