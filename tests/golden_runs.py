"""Small runs of every study on one CPU thread, kept in `golden/`: what moves when nothing was meant to.

uv run python tests/golden_runs.py --exact     # against what is kept, to the bit (on the machine that made it)
uv run python tests/golden_runs.py --write     # after a change that is meant, with its old and new numbers told
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

GOLDEN = Path(__file__).parent / "golden"


def runs(out: Path) -> dict[str, Callable[[], tuple[list[dict], pd.DataFrame]]]:
    """By kind: a function that measures, and gives what the runs depend on and their rows."""
    import transformers.utils.logging
    from common import tokenizer as trained
    from families import make
    from injection_suites import build
    from nsa_probing import EPISODES, save

    from anchors.analyses.causal import Causal
    from anchors.analyses.classification import Classification
    from anchors.analyses.compression import Compression, Speed
    from anchors.analyses.diagnosis import Diagnosis
    from anchors.analyses.flow import FlowMap, InformationFlow
    from anchors.analyses.isolation import Isolation, TopWords
    from anchors.analyses.readout import Readout
    from anchors.analyses.reweighting import Reweighting
    from anchors.injection.asking.suite import Suite
    from anchors.injection.image_flow.report import Wanted
    from anchors.injection.image_flow.report import measure as measure_flow
    from anchors.injection.merging.recipe import Recipe
    from anchors.injection.sweeping.grid import Grid
    from anchors.injection.sweeping.sweep import Sweep, sweep
    from anchors.model.language import load
    from anchors.nsa.probing.probe import EpisodeProbe
    from anchors.nsa.probing.probe import measure as measure_probe
    from anchors.study.runner import Sample, measure
    from anchors.tasks.data import read
    from anchors.tasks.task import TASKS

    transformers.utils.logging.disable_progress_bar()
    words = trained.__wrapped__()
    model = load(make("llama", len(words)), tokenizer=words, device="cpu")
    task = TASKS["sst2"]
    data, sample = read(task), Sample(seeds=(1, 2), examples=3)

    def studied(analysis, **how):
        from dataclasses import replace

        found = measure(model, analysis, task, data, replace(sample, **how), out=out)
        return [found.config], found.rows

    def probed():
        found = measure_probe(
            load(save(out / "nsa", "nsa"), device="cpu"), EpisodeProbe(EPISODES, prompts=2), out=out
        )
        return [found.config], found.rows

    def swept():
        suite = Suite.open(build(out / "sweep", 0))
        grid = Grid("small", ("task-arithmetic", "dare"), (0.5, 1.0), (0.5,), 1)
        found = sweep([suite], Sweep(grid), out=out, device="cpu")
        return found.configs, found.rows

    def flowed():
        folder = build(out / "flow", examples=18)
        for path in folder.glob("*.jsonl"):
            path.write_text(path.read_text().replace('"tune"', '"demonstration"'))
        facts = json.loads((folder / "suite.json").read_text())
        (folder / "suite.json").write_text(json.dumps(facts | {"separator": " say "}))
        wanted = Wanted(Recipe(), (0.0, 0.5), shots=1, prompts=3, examples=3, experts=("instruction",))
        found = measure_flow([Suite.open(folder)], wanted, out=out, device="cpu")
        return found.configs, found.rows

    return {
        "flow": lambda: studied(InformationFlow()),
        "map": lambda: studied(FlowMap(layers=(1,)), examples=1),
        "classify": lambda: studied(Classification(calibrate=True)),
        "classify-permuted": lambda: studied(Classification(), control="permuted-labels", shots=2),
        "isolate": lambda: studied(Isolation(layers=(1, 2))),
        "words": lambda: studied(TopWords(Isolation(layers=(1,), sides=("first",)))),
        "readout": lambda: studied(Readout()),
        "reweight": lambda: studied(Reweighting(epochs=2, per_class=1)),
        "compress": lambda: studied(Compression(draws=2)),
        "speed": lambda: studied(Speed()),
        "diagnose": lambda: studied(Diagnosis(components=(2,))),
        "causal": lambda: studied(Causal()),
        "nsa_probe": probed,
        "inject-sweep": swept,
        "inject-flow": flowed,
    }  # fmt: skip


QUOTIENTS = ("shift", "follow")
"""Of differences of logits, which another processor rounds otherwise: 1e-5 apart where all else agrees to 1e-6."""


def difference(kind: str, configs: list[dict], rows: pd.DataFrame, *, exact: bool) -> str | None:
    """In words, what of a run is not as it is kept; None where all is."""
    from anchors.study.results import key_of

    kept = json.loads((GOLDEN / "keys.json").read_text())[kind]
    keys = [key_of(config) for config in configs]
    if kind == "speed":  # seconds of this machine
        return None if list(rows.columns) == kept["columns"] else f"columns {list(rows.columns)}"
    if keys != kept["keys"]:
        return f"keys {keys}, kept {kept['keys']}"
    if list(rows.columns) != kept["columns"]:
        return f"columns {list(rows.columns)}, kept {kept['columns']}"
    before = pd.read_parquet(GOLDEN / f"{kind}.parquet")
    if len(rows) != len(before):
        return f"{len(rows)} rows, kept {len(before)}"
    rounded = before.get("metric", pd.Series("", before.index)).isin(QUOTIENTS).to_numpy()
    try:
        for which, least in ((~rounded, 1e-6), (rounded, 1e-4)):
            own, other = (_plain(x[which]) for x in (rows, before))
            pd.testing.assert_frame_equal(
                own, other, check_exact=exact, rtol=1e-4, atol=least, check_dtype=False
            )
    except AssertionError as error:
        return str(error)
    return None


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Categories as text, for parquet keeps them otherwise."""
    return rows.astype({c: "str" for c in rows if rows[c].dtype.name in ("category", "object")})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--exact", action="store_true")
    args = parser.parse_args()
    from anchors.model.identity import software
    from anchors.study.results import key_of

    torch.set_num_threads(1)
    kept, wrong = {}, False
    with tempfile.TemporaryDirectory() as folder:
        for kind, run in runs(Path(folder)).items():
            configs, rows = run()
            kept[kind] = {"keys": [key_of(config) for config in configs], "columns": list(rows.columns)}
            if not args.write:
                said = difference(kind, configs, rows, exact=args.exact)
                print(f"{kind}: {said or 'as kept'}")
                wrong |= said is not None
            elif kind != "speed":
                _plain(rows).to_parquet(GOLDEN / f"{kind}.parquet", index=False, compression="zstd")
    if args.write:
        (GOLDEN / "keys.json").write_text(json.dumps({"software": software()} | kept, indent=1) + "\n")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
