"""Every test that needs a CUDA device, on the card at hand, and one line of what came of it in benchmarks/cuda_tests.csv.

uv run benchmarks/cuda_tests.py                      # with the commit of this checkout
python benchmarks/cuda_tests.py --commit 54d7191     # where only the files are, without git
"""

import argparse
import csv
import datetime
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "date", "commit", "card", "torch", "triton", "transformers", "passed", "failed", "skipped", "seconds"
)  # fmt: skip


def commit() -> str:
    """The commit at hand, with a plus when files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    if said.returncode:
        sys.exit("This is no git checkout: say --commit.")
    return said.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", help="of the files at hand, where git cannot say it")
    parser.add_argument("--log", type=Path, default=Path(__file__).with_suffix(".csv"))
    args, more = parser.parse_known_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here.")
    at = args.commit or commit()
    began = time.perf_counter()
    files = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "needs_cuda" in f.read_text()]
    cores = os.cpu_count() or 1
    workers = min(14, cores)
    # What they compute on the CPU to compare with would take all cores in every worker.
    threads = os.environ | {"OMP_NUM_THREADS": str(cores // workers)}
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-m", "cuda", "-p", "no:cacheprovider",
         "--durations=8", *more, *files],
        cwd=ROOT, stdout=subprocess.PIPE, env=threads,
    )  # fmt: skip
    said = b""
    while piece := run.stdout.read1():  # dots as they come: a line of them may take minutes
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
        said = (said + piece)[-2000:]
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": at,
        "card": torch.cuda.get_device_name(),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "seconds": round(time.perf_counter() - began),
    }
    new = not args.log.exists()
    with args.log.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(" · ".join(f"{key} {value}" for key, value in row.items()))
    sys.exit(run.wait())


if __name__ == "__main__":
    main()
