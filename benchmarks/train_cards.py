"""Training in one process and in several: tokens a second, and the largest difference of the two loss curves.

uv run benchmarks/train_cards.py                                   # on two cards: `nsa train`, some 150 million weights
uv run benchmarks/train_cards.py --what demo                       # the stages of `inject demo`: questions a second
uv run benchmarks/train_cards.py --launcher torchrun --width 64 --layers 2 --heads 2 --tokens 128 --batch 8    # on a CPU

Each row is a launch of its own with the same batch of all processes together. In bf16 products, as trainings run on
cards, two shares of a batch are rounded otherwise than the whole; in float32 the curves show whether they are the same.
On a CPU both are float32, and `accelerate launch` starts one process only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

EVERY = 10
"""Steps between looks; the first ones are not timed."""


def launched(args: argparse.Namespace, processes: int, products: str, folder: Path) -> dict:
    """What one launch came to."""
    out = folder / f"{products}-{processes}"
    launcher = {
        "accelerate": ["accelerate.commands.launch", "--num_processes", str(processes)],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)],
    }[args.launcher]
    run = subprocess.run(
        [sys.executable, "-m", *launcher, __file__, *sys.argv[1:], "--worker", products, str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if run.returncode:
        sys.exit(run.stderr[-4000:])
    found = json.loads(out.with_suffix(".json").read_text())
    if found["processes"] != processes:
        sys.exit(
            f"{processes} processes were asked for, {found['processes']} trained: take the other --launcher."
        )
    return found


def worker(args: argparse.Namespace) -> None:
    """One of the processes of a launch; the first one says what came of it."""
    from anchors.injection.demo import training as demo
    from anchors.nsa.training import train as nsa
    from anchors.training import Team

    products, out = args.worker[0], Path(args.worker[1])
    if products == "float32":
        nsa.arithmetic = demo.arithmetic = lambda device: nullcontext()
    demo.OFTEN = EVERY
    team = Team.made("auto")
    curve, speeds = (episodes if args.what == "nsa" else stages)(args, out, team)
    found = {"curve": curve, "speed": median(speeds), "processes": team.size, "device": team.name}
    if team.main:
        out.with_suffix(".json").write_text(json.dumps(found))


def episodes(args: argparse.Namespace, out: Path, team: object) -> tuple[list[float], list[float]]:
    """The losses and tokens a second in the log of `nsa train`."""
    from anchors.nsa import NSAConfig
    from anchors.nsa.training.episodes import Episodes
    from anchors.nsa.training.train import Training, Watch, train

    data = Episodes(tokens=args.tokens)
    config = NSAConfig(
        vocab_size=len(data.tokenizer()), hidden_size=args.width, intermediate_size=2 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=max(1, args.heads // 2),
        head_dim=args.width // args.heads, max_position_embeddings=args.tokens, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, attention=args.attention,
    )  # fmt: skip
    recipe = Training(steps=args.steps, batch=args.batch, warmup=args.steps // 4, grow=0.0)
    watch = Watch(every=EVERY, evaluate=args.steps, save=args.steps, held_out=1)
    log = train(config, data, recipe, out=out, watch=watch).log
    own = log[log["split"] == "train"].sort_values(["metric", "step"])
    losses = own[own["metric"].isin(("label_loss", "text_loss"))]["value"]
    return losses.tolist(), own[own["metric"] == "tokens_per_second"]["value"].tolist()[1:]


def stages(args: argparse.Namespace, out: Path, team: object) -> tuple[list[float], list[float]]:
    """The losses of every stage of `inject demo` that trains a language tower, and questions a second."""
    from anchors.injection.demo.build import Builder
    from anchors.injection.demo.scales import TINY, Stage, TowerSize

    stage = Stage(steps=args.steps, lr=1e-4, items=args.batch, lm_lr=1e-4)
    small = {"test": 8, "tune": 4, "demonstration": 4}
    scale = replace(
        TINY, language=TowerSize(args.layers, args.width, args.heads, 2 * args.width), base=stage, classify=stage,
        project=stage, gentle=stage, experts=dict.fromkeys(TINY.experts, stage), held_out=small,
    )  # fmt: skip
    heard: dict[str, list[float]] = {}

    def report(name: str, done: int, total: int) -> None:
        if done % EVERY == 0:  # the loss was just looked at, so that the device has done these steps
            heard.setdefault(name, []).append(time.perf_counter())

    built = Builder(out, scale, 0, team.device, upper=False, several=team).build(report)
    towers = [name for name in built if name == "vlm" or name.startswith(("base", "experts"))]
    speeds = [
        EVERY * args.batch / (after - before)
        for name in towers
        for before, after in zip(heard[name][2:-1], heard[name][3:-1], strict=False)
    ]
    return [loss for part in built.values() for loss in part.facts.get("loss", [])], speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=("nsa", "demo"), default="nsa")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--launcher", choices=("accelerate", "torchrun"), default="accelerate")
    parser.add_argument("--products", nargs="+", choices=("bf16", "float32"), default=["bf16", "float32"])
    parser.add_argument("--attention", choices=("full", "nsa"), default="full")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence, for nsa")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step, or questions")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    unit = "tokens/s" if args.what == "nsa" else "questions/s"
    for products in args.products:
        with tempfile.TemporaryDirectory() as folder:
            one, more = (launched(args, n, products, Path(folder)) for n in (1, args.processes))
        apart = max(abs(a - b) for a, b in zip(one["curve"], more["curve"], strict=True))
        print(
            f"{products} on {one['device']}, torch {version('torch')}: {one['speed']:.0f} {unit} in one process, "
            f"{more['speed']:.0f} in {args.processes}: {more['speed'] / one['speed']:.2f} times; "
            f"of {len(one['curve'])} losses the two curves differ by {apart:.1e} at most"
        )


if __name__ == "__main__":
    main()
