"""Our merge beside mergekit's on random checkpoints of a billion parameters: wall time and peak anonymous memory.

The three language models have TinyLlama's shapes (1.1 billion parameters, bfloat16, 2.2 GB), or those of another; the vision-language model
is one of them behind LLaVA's names, with a vision tower and a projector. Ours merges base and expert into the
vision-language model; mergekit, which cannot, merges the same numbers as three language models. Task arithmetic,
weights 1 and 0.5. Ours computes in float32, with embedding and head kept (the default) or merged; mergekit merges them
and computes in the `dtype` of its recipe: in bfloat16 with a whole output shard in memory (its default) or with small
ones, and once in float32, whose result is compared with ours, tensor by tensor.

Each merge is a process of its own, imports included. Its anonymous memory (RssAnon of it and its children: what it
must have; pages of mapped files can be given back at any time) is sampled every 50 ms. Sides alternate.

    uv run benchmarks/injection_memory.py                      # needs 14 GB of disk, which it gives back
    uv run benchmarks/injection_memory.py --layers 2 --rounds 1     # a quick look
    uv run benchmarks/injection_memory.py --shape llama-2-70b --layers 2 --rounds 1     # 32 GB of disk
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer as Words
from tokenizers import models as kinds
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from anchors.injection.merging.checkpoint import Checkpoint, Entry
from anchors.injection.merging.draft import write_shard

SHAPES = {"tinyllama": (2048, 5632, 32, 4, 32000, 22), "llama-2-70b": (8192, 28672, 64, 8, 32000, 80)}
"""Width, inner width, heads, groups, vocabulary, layers."""
WIDTH, INNER, HEADS, GROUPS, VOCABULARY, LAYERS = SHAPES["tinyllama"]
VISION = 1024
STRENGTH = 0.5
COMPARED = ("ours, embeddings keep", "mergekit default, float32")
OURS = """
import sys, torch
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe
torch.set_num_threads(int(sys.argv[6]))
merge(*sys.argv[1:4], Recipe("task-arithmetic", strength={strength}, embeddings=sys.argv[5]), sys.argv[4])
"""
YAML = """merge_method: task_arithmetic
base_model: {base}
models:
  - model: {tower}
    parameters: {{weight: 1.0}}
  - model: {expert}
    parameters: {{weight: {strength}}}
dtype: {dtype}
out_dtype: bfloat16
"""
ONCE = ("ours, embeddings shared-rows", "mergekit default, float32")

Shapes = Mapping[str, tuple[int, ...]]


def llama(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    narrow = WIDTH // HEADS * GROUPS
    for i in range(layers):
        own = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (narrow, WIDTH),
            "self_attn.v_proj": (narrow, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def eyes() -> dict[str, tuple[int, ...]]:
    layers = "vision_tower.vision_model.encoder.layers"
    shapes = {f"{layers}.{i}.mlp.{n}.weight": (4 * VISION, VISION) for i in range(6) for n in ("fc1", "fc2")}
    return shapes | {"multi_modal_projector.linear_1.weight": (WIDTH, VISION)}


def save(folder: Path, shapes: Shapes, config: dict, seeds: Mapping[int, float], prefix: str = "") -> None:
    """Random numbers, the sum of those of several seeds times a size each, so that models have a common base."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))

    def made(name: str) -> Tensor:
        shape = shapes[name]
        total = torch.zeros(shape)
        for seed, size in seeds.items():
            where = sum(name.removeprefix(prefix).encode()) * 1000 + seed
            total += size * torch.randn(shape, generator=torch.Generator().manual_seed(where))
        return total.bfloat16()

    path = folder / "model.safetensors"
    entries = {
        name: Entry(path, "BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()
    }
    write_shard(path, entries, made)


def prepare(folder: Path, layers: int) -> None:
    folder.mkdir()
    shapes = llama(layers)
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).to_dict()  # fmt: skip
    both = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    base = {0: 0.02}
    save(folder / "base", shapes, text, base)
    save(folder / "expert", shapes, text, base | {1: 0.002})
    save(folder / "tower", shapes, text, base | {2: 0.001})
    inside = {f"language_model.{name}": shape for name, shape in shapes.items()}
    save(folder / "vlm", eyes() | inside, both, base | {2: 0.001}, "language_model.")
    words = kinds.WordLevel({f"word{i}": i for i in range(VOCABULARY)}, unk_token="word0")  # noqa: S106 - no password
    for place in folder.iterdir():
        PreTrainedTokenizerFast(tokenizer_object=Words(words)).save_pretrained(place)


def anonymous(pid: int) -> int:
    """Anonymous bytes of a process and its children."""
    total, waiting = 0, [pid]
    while waiting:
        own = waiting.pop()
        try:
            status = Path(f"/proc/{own}/status").read_text()
            total += (
                next((int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon:")), 0) * 1024
            )
            for task in Path(f"/proc/{own}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, seconds of processors, and peak anonymous GB of a command."""
    with tempfile.TemporaryFile() as said:
        start, busy, peak = time.perf_counter(), processors(), 0
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{command[:2]} ended with {process.returncode}:\n{said.read().decode()[-3000:]}"
            )
    return seconds, processors() - busy, peak / 1e9


def processors() -> float:
    """Seconds that processors have worked for commands that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def commands(folder: Path, out: Path, threads: int) -> Iterator[tuple[str, list[str]]]:
    ours = [sys.executable, "-c", OURS.format(strength=STRENGTH)]
    models = [str(folder / name) for name in ("vlm", "expert", "base")]
    for policy in ("keep", "shared-rows"):
        yield f"ours, embeddings {policy}", [*ours, *models, str(out), policy, str(threads)]
    mergekit = str(Path(sys.executable).with_name("mergekit-yaml"))
    for dtype, more in (("bfloat16", []), ("bfloat16", ["--out-shard-size", "256M"]), ("float32", [])):
        recipe = folder / f"{dtype}.yml"
        names = {name: folder / name for name in ("base", "tower", "expert")}
        recipe.write_text(YAML.format(**names, strength=STRENGTH, dtype=dtype))
        arguments = [str(recipe), str(out), "--no-copy-tokenizer", *more]
        yield f"mergekit {' '.join(more) or 'default'}, {dtype}", [mergekit, *arguments]


def apart(one: Path, other: Path) -> float:
    """Largest difference of a merged number, relative to the largest of its tensor, over the tensors of the layers."""
    ours, theirs = Checkpoint.open(one), Checkpoint.open(other)
    worst = 0.0
    for name in theirs.entries:
        if ".layers." in name:
            a, b = ours.tensor(f"language_model.{name}").float(), theirs.tensor(name).float()
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, help="by default as many as the shape has")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--models", type=Path, help="folder of the models, made if it is not there, and kept")
    arguments = parser.parse_args()
    globals().update(
        zip(
            ("WIDTH", "INNER", "HEADS", "GROUPS", "VOCABULARY", "LAYERS"),
            SHAPES[arguments.shape],
            strict=True,
        )
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    measures: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory(
        prefix="injection-", dir=arguments.models and arguments.models.parent
    ) as place:
        work = Path(place)
        models = arguments.models or work / "models"
        if not models.is_dir():
            prepare(models, arguments.layers or LAYERS)
        kept: dict[str, Path] = {}
        for turn in range(arguments.rounds):
            for name, command in commands(models, work / "out", arguments.threads):
                if turn and name in ONCE:
                    continue
                found = measured(command, environment)
                measures.setdefault(name, []).append(found)
                seconds, busy, peak = found
                load = os.getloadavg()[0]
                print(
                    f"{name}: {seconds:.1f} s ({busy:.1f} s busy), {peak:.2f} GB, load {load:.1f}", flush=True
                )
                if not turn and name in COMPARED:
                    kept[name] = (work / "out").rename(work / f"kept{len(kept)}")
                else:
                    shutil.rmtree(work / "out")
        print(
            f"largest relative difference of {' and '.join(COMPARED)}: {apart(*map(kept.get, COMPARED)):.1e}"
        )
    print(f"{'':48}{'median s':>10}{'busy s':>10}{'peak anonymous GB':>20}")
    for name, found in measures.items():
        seconds, busy, _ = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name:48}{seconds:10.1f}{busy:10.1f}{max(peak for *_, peak in found):20.2f}")


if __name__ == "__main__":
    main()
