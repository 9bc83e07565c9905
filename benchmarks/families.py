"""Every number of the toolkit on a tiny random model of every family of the installed transformers, against a computation
that uses nothing of the toolkit: transformers' own eager attention in a fresh model, autograd, hooks, and loops.

    uv run benchmarks/families.py                        # all causal and image-text families, about an hour on one core
    uv run benchmarks/families.py llama phi3+longrope    # some; image-text ones as image-text/llava
    uv run benchmarks/families.py --out families.csv     # the table; families.md beside it; goes on where it was stopped
    uv run benchmarks/families.py --again llama bart     # these anew, all others as their last run left them

Verdicts: `exact` (tolerances in `sweep.family`), `refused` (an AnchorsError; the column `shown` says what the untouched
model shows that is a cause), `wrong`, `crash`, `unjudged` (no right value), `not tried`. Exit code 1 if anything is wrong or
crashes. Each family runs in a process of its own with limits of memory and time.
"""

import argparse
import csv
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# Installed kernels of the delta rule run on no CPU; without them transformers takes its own torch code.
sys.modules["fla"] = None
warnings.filterwarnings("ignore")

import pandas  # noqa: F401 - loaded once, before the processes part
import scipy.stats  # noqa: F401
import torch
import transformers
from sweep import family as causal
from sweep import images, prompts, tiny
from sweep.family import Row

FORK = multiprocessing.get_context("fork")
VERDICTS = ("exact", "refused", "wrong", "crash", "unjudged", "not tried")
IMAGE = "image-text/"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="names or variants; none means all")
    parser.add_argument("--out", type=Path, default=Path("families.csv"), help="the table")
    parser.add_argument(
        "--again", action="store_true", help="run the named families anew and keep the rows of all others, whatever commit "
        "they are of (the table says which)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--seconds", type=int, default=300, help="limit of processor time for a family")
    parser.add_argument("--gigabytes", type=int, default=6, help="limit of memory for a family")
    chosen = parser.parse_args()
    known = [*tiny.families(), *(IMAGE + name for name in tiny.IMAGES)]
    if unknown := [name for name in chosen.families if name not in known]:
        parser.error(f"no such family: {', '.join(unknown)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    now = Origin(commit(), version("transformers"), identity())
    done: dict[str, list[Row]] = {}
    origins: dict[str, Origin] = {}
    anew = set(chosen.families) if chosen.again else set()
    for name, (origin, own) in read(chosen.out).items():
        if origin == now or (chosen.again and name not in anew):
            done[name], origins[name] = own, origin
    names = known if chosen.again else chosen.families or known
    print(f"{len(names)} families, {len(set(names) & set(done))} of them already done", flush=True)
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        folder = Path(scratch)
        drawing = FORK.Process(target=prompts.write, args=(folder,))
        drawing.start()
        drawing.join()
        if drawing.exitcode:
            return 2
        edge, size, groups = prompts.read(folder)

        def asked(name: str) -> list[Row]:
            assert not any(module.partition(".")[0] == "anchors" for module in sys.modules), (
                "the toolkit is loaded"
            )
            own = folder / name.replace("/", "-")
            if name.startswith(IMAGE):
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                return images.sweep(name.removeprefix(IMAGE), size, edge, groups, tokenizer)
            own.mkdir()
            for file in folder.glob("tokenizer*"):
                (own / file.name).write_bytes(file.read_bytes())
            return causal.sweep(name, own, size, edge, groups)

        todo = [name for name in names if name not in done]
        for name, rows, seconds in apart(asked, todo, chosen.jobs, chosen.seconds, chosen.gigabytes << 30):
            done[name], origins[name] = rows, now
            write(chosen.out, {name: done[name] for name in names if name in done}, origins)
            print(f"{name}: {summed(rows)}  [{seconds:.0f} s]", flush=True)
    rows = [row for name in names for row in done[name]]
    write(chosen.out, {name: done[name] for name in names}, origins)
    counts = Counter(row.verdict for row in rows if row.number != "certificate")
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    return int(bool(counts["wrong"] or counts["crash"]))


class Origin(NamedTuple):
    """Where rows come from: the commit, the version of transformers, and all that they depend on as a hash."""

    commit: str
    transformers: str
    key: str


def read(path: Path) -> dict[str, tuple[Origin, list[Row]]]:
    """What a table holds, by name of the family as it is asked for."""
    found: dict[str, tuple[Origin, list[Row]]] = {}
    with path.open(newline="") if path.exists() else nullcontext([]) as file:
        for record in csv.DictReader(file):
            origin = Origin(*(record.pop(name) for name in Origin._fields))
            error = record.pop("error")
            row = Row(**record, error=float(error) if error else None)
            name = IMAGE * (row.kind == "image-text") + row.family
            found.setdefault(name, (origin, []))[1].append(row)
    return found


def identity() -> str:
    """What the rows depend on: the sources of the toolkit and of the sweep, and versions."""
    spec = importlib.util.find_spec("anchors")
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for home in (*spec.submodule_search_locations, str(Path(__file__).parent / "sweep")):
        for file in sorted(Path(home).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit at hand, with a plus when the sources differ from it."""
    home = Path(__file__).parents[1]
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=home, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "anchors", "benchmarks"], cwd=home)
    return said.stdout.strip() + "+" * bool(changed.returncode)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("label-anchors", "transformers", "torch")} | {
        "python": platform.python_version()
    }


def apart(
    task: Callable[[str], list[Row]], names: Sequence[str], jobs: int, seconds: int, most: int
) -> Iterator[tuple[str, list[Row], float]]:
    """Run a task for each name in a process of its own, some at a time; what breaks a limit becomes a row, too."""
    waiting, running = list(names), {}

    def child(name: str, pipe) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        try:
            pipe.send(task(name))
        except BaseException as error:  # noqa: BLE001 - the harness itself failed: say where
            pipe.send([failed(name, f"the sweep itself: {causal.place(error)}")])

    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = FORK.Pipe(duplex=False)
            process = FORK.Process(target=child, args=(name, there))
            process.start()
            there.close()
            running[here] = (name, process, time.time())
        for pipe in wait(list(running)):
            name, process, began = running.pop(pipe)
            try:
                rows = pipe.recv()
                process.join()
            except EOFError:
                process.join()
                late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
                rows = [failed(name, f"more than {seconds} s" if late else f"ended with {process.exitcode}")]
            yield name, rows, time.time() - began


def failed(name: str, reason: str) -> Row:
    kind = "image-text" if name.startswith(IMAGE) else "causal"
    return Row(name.removeprefix(IMAGE), kind, "all", "crash", reason=reason)


def summed(rows: Sequence[Row]) -> str:
    """A family in a line: how many of each verdict, and what is wrong."""
    counts = Counter(row.verdict for row in rows if row.number != "certificate")
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    wrong = [f"{row.number} off by {row.error:.1e}" for row in rows if row.verdict == "wrong"]
    first = next((row.reason[:110] for row in rows if row.verdict in ("refused", "crash", "not tried")), "")
    return "; ".join(part for part in (said, ", ".join(wrong), first) if part)


READING = """\
Read a row from left to right: `exact` is within the tolerances of `benchmarks/sweep/family.py` of what the untouched model
gives under its own eager attention; `refused` means the toolkit raised an AnchorsError, whose sentence stands under *first
reason* and whose cause, as the untouched model shows it without the toolkit, under *what the untouched model shows*;
`not tried` names why there is no tiny model. `certificate` is the whole of `anchors check`; where it refuses, so does every
number. Weights are random and large enough for attention to be far from uniform; prompts stand on both sides of the length
at which a family's attention changes. Maps, sums, re-weighting and patching are compared in float64 where the family runs
in it, all else in float32.
"""


def write(path: Path, done: dict[str, list[Row]], origins: dict[str, Origin]) -> None:
    """The table, and a page: how to read it, counts, then every family."""
    whole_of_it = path.with_suffix(".part")
    with whole_of_it.open("w", newline="") as file:
        table = csv.DictWriter(file, [*Row.__dataclass_fields__, *Origin._fields])
        table.writeheader()
        for name, own in done.items():
            table.writerows(causal.as_record(row) | origins[name]._asdict() for row in own)
    whole_of_it.replace(path)
    rows = [row for own in done.values() for row in own]
    said = ", ".join(f"{name} {number}" for name, number in versions().items())
    at = Counter(origins[name].commit for name in done)
    page = [
        "# Families",
        f"Every number on {len(done)} tiny random models against transformers' own eager attention, by "
        f"`OMP_NUM_THREADS=1 uv run benchmarks/families.py --out {path.name}`; {said}; commit "
        f"{', '.join(f'{own} ({n} families)' for own, n in at.most_common())}. All rows with errors and reasons: "
        f"`{path.name}`.\n",
        READING,
    ]
    for kind in ("causal", "image-text"):
        own = [row for row in rows if row.kind == kind]
        if not own:
            continue
        numbers = list(dict.fromkeys(row.number for row in own))
        by_number = {n: Counter(row.verdict for row in own if row.number == n) for n in numbers}
        page += [f"## {kind}\n", f"| number | {' | '.join(VERDICTS)} |", "|---" * (len(VERDICTS) + 1) + "|"]
        page += [f"| {n} | {' | '.join(str(by_number[n][v] or '') for v in VERDICTS)} |" for n in numbers]
        columns = [n for n in numbers if n != "all"]
        page += ["", whole(own), "", *causes(own), ""]
        page += [
            f"| family | {' | '.join(columns)} | first reason | what the untouched model shows |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for family in dict.fromkeys(row.family for row in own):
            found = {row.number: row for row in own if row.family == family}
            all_of_it = found.get("all")
            cells = [
                all_of_it.verdict if all_of_it else found[n].verdict if n in found else "" for n in columns
            ]
            bad = next(
                (row for row in found.values() if row.verdict != "exact" and (row.reason or row.shown)), None
            )
            notes = ["", ""] if bad is None else [f"{bad.number}: {bad.reason}", bad.shown]
            page.append(f"| {family} | {' | '.join(cells)} | {' | '.join(cell(note) for note in notes)} |")
        page.append("")
    path.with_suffix(".md").write_text("\n".join(page))


def whole(rows: Sequence[Row]) -> str:
    """How many families, and variants of families, are exact in every number, in some, in none."""
    counts: dict[bool, Counter] = {False: Counter(), True: Counter()}
    for family in dict.fromkeys(row.family for row in rows):
        verdicts = {row.verdict for row in rows if row.family == family}
        bad = next((v for v in ("crash", "wrong", "unjudged", "not tried") if v in verdicts), None)
        partly = {"exact", "refused"} <= verdicts
        counts["+" in family][bad or ("exact in part, the rest refused" if partly else verdicts.pop())] += 1
    return "; ".join(
        f"{sum(own.values())} {what}: " + ", ".join(f"{n} {verdict}" for verdict, n in own.most_common())
        for what, own in (("families", counts[False]), ("variants", counts[True]))
        if own
    )


def causes(rows: Sequence[Row]) -> list[str]:
    """A table of what was refused, and of what was not tried: the first sentence, without names and numbers, and whom it met."""
    met: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row.verdict in ("refused", "not tried"):
            what = (
                "not tried"
                if row.verdict == "not tried"
                else "all"
                if row.number == "certificate"
                else row.number
            )
            met.setdefault((anonymous(row.reason), row.family), {})[what] = None
    by_cause: dict[str, dict[str, str]] = {}
    for (cause, family), numbers in met.items():
        by_cause.setdefault(cause, {})[family] = "all" if "all" in numbers else ", ".join(numbers)
    if not by_cause:
        return []
    found = ["| cause | numbers | families |", "|---|---|---|"]
    for cause, own in sorted(by_cause.items(), key=lambda item: -len(item[1])):
        groups: dict[str, list[str]] = {}
        for family, numbers in own.items():
            groups.setdefault(numbers, []).append(family)
        found += [
            f"| {cell(cause)} | {numbers} | {len(names)}: {', '.join(names)} |"
            for numbers, names in groups.items()
        ]
    return found


def anonymous(reason: str) -> str:
    """The first sentence of a refusal without what is one family's own: names of classes and files, numbers."""
    first = re.split(r"(?<=[.:]) (?=[A-Z])", reason)[0]
    first = re.sub(r"\S*/families-\S+|…/\S+|'?\b(?:x?[A-Z]+[a-z0-9_]+){2,}\w*'?", "…", first)
    return re.sub(r"\d[\d.e+-]*", "n", first)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:240]


if __name__ == "__main__":
    sys.exit(main())
