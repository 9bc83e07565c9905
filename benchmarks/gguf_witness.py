"""GGUF files as we convert them against llama.cpp itself: logits and token ids of the same file.

llama.cpp (llama-cpp-python) runs in a process and an environment of its own, with keys and values in float32:

    uv venv ../llama && uv pip install --python ../llama/bin/python llama-cpp-python numpy
    uv run benchmarks/gguf_witness.py --llama ../llama/bin/python --out experiments/gguf/llama_cpp.json
    uv run benchmarks/gguf_witness.py --llama ... --file some.gguf        # any other file, too

Per file: ‖ours − llama.cpp's‖ / ‖llama.cpp's‖ over the logits of every position of every text, with the means over the
vocabulary taken out, the share of positions with the same best token, and the number of texts with other ids. Files:
the default model as it is (Q4_1: llama.cpp multiplies quantised weights with activations rounded to 8 bits, we with
float32), the same weights written as float32, a tiny random model of every architecture and of every rotary scaling,
and a vocabulary under every pre-tokenizer's name, with merges across all borders of words, so that every border shows.

What is left: GELU is a table in half precision in llama.cpp (3e-4 in the families that have it), and other ids where
it departs from the file, which anchors/gguf/tokens.py lists.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TEXTS = (
    "It's 2024 and they've paid $1,234.56 -- I'LL say that's 12345678 too much!",
    "Review: a gripping, beautifully shot film .\nSentiment: positive\n\nReview: dull\nSentiment:",
    "  two spaces,\ttabs\t\tand  \n \n\n newlines \r\n at the end   ",
    "def f(x):\n    return x**2 + 3.14e-10  # comment\n\n\nclass A:\n\tpass",
    "Größe, façade, naïve, Ångström, ŒUVRE, ÉCOLE; Ελλάδα, Россия, Việt Nam",
    "日本語のテキスト、中文文本。한국어 텍스트! नमस्ते दुनिया, สวัสดี, مرحبا، كيف الحال؟ שלום",
    "emoji 😀👩‍👩‍👧, ½ ² Ⅷ ٣٤٥ १२३, “quotes” — dashes… a/b\\c <tag attr='x'> [1,2]{3}",
    "DON'T we'D i'M you'Re HTTPServer XMLHttpRequest camelCase snake_case don’t",
    "a<think>b </think>c</s>d <s>e<|im_start|>user\n hi<|im_end|>   <think>    x",
    "",
    " ",
    "x",
)
EVERY = 64


def worker(request: str, answer: str) -> None:
    """In llama.cpp's environment: ids of every text, and logits at every position of the ids that are given."""
    import llama_cpp

    asked = json.loads(Path(request).read_text())
    results = {"version": np.array(llama_cpp.__version__)}
    for number, job in enumerate(asked):
        vocabulary = job["ids"] is None
        model = llama_cpp.Llama(
            job["file"], n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, verbose=False, vocab_only=vocabulary,
            type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1,
        )  # fmt: skip
        for i, text in enumerate(job["texts"]):
            results[f"{number}/{i}/ids"] = np.array(model.tokenize(text.encode(), True, True), np.int64)
        for i, ids in enumerate(job["ids"] or []):
            if ids:
                model.reset()
                model.eval(ids)
                results[f"{number}/{i}/logits"] = np.array(model.scores[: len(ids)], np.float32)
    np.savez(answer, **results)


def compare(files: dict[str, Path], vocabularies: dict[str, Path], python: str) -> dict:
    """The numbers of every file, ours beside llama.cpp's."""
    import torch
    from transformers import AutoModelForCausalLM

    from anchors.gguf import converted
    from anchors.gguf.reading import read
    from anchors.gguf.tokens import tokenizer

    jobs, ours = [], []
    for path in files.values():
        where = converted(path)
        model = AutoModelForCausalLM.from_pretrained(where, attn_implementation="eager")
        words = tokenizer(read(path))
        ids = [words(text).input_ids for text in TEXTS]
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0].numpy() if row else None for row in ids]
        jobs.append({"file": str(path), "texts": TEXTS, "ids": ids})
        ours.append((ids, logits))
    for path in vocabularies.values():
        words = tokenizer(read(path))
        jobs.append({"file": str(path), "texts": TEXTS, "ids": None})
        ours.append(([words(text).input_ids for text in TEXTS], None))
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.npz"
        request.write_text(json.dumps(jobs))
        subprocess.run([python, __file__, "--worker", str(request), str(answer)], check=True)
        theirs = dict(np.load(answer))
    rows = {}
    for number, (name, (ids, logits)) in enumerate(zip([*files, *vocabularies], ours, strict=True)):
        other = [i for i, row in enumerate(ids) if row != theirs[f"{number}/{i}/ids"].tolist()]
        row = {"tokens": sum(map(len, ids)), "texts_with_other_ids": other}
        if logits is not None:
            kept = [i for i, mine in enumerate(logits) if mine is not None]
            mine, his = (np.concatenate(x).astype(np.float64) for x in (
                [logits[i] for i in kept], [theirs[f"{number}/{i}/logits"] for i in kept]))  # fmt: skip
            same = float((mine.argmax(-1) == his.argmax(-1)).mean())
            mine, his = mine - mine.mean(-1, keepdims=True), his - his.mean(-1, keepdims=True)
            row["relative_error_of_logits"] = float(f"{np.linalg.norm(mine - his) / np.linalg.norm(his):.2e}")
            row["same_best_token"] = round(same, 4)
        rows[name] = row
    # Of the default model in float32, for the tests: all ids, and one text's last logits at every 64th token.
    last = theirs["1/1/logits"][-1].astype(np.float64)
    default = {
        "texts": TEXTS,
        "ids": [theirs[f"1/{i}/ids"].tolist() for i in range(len(TEXTS))],
        "every": EVERY,
        "logits": [round(x, 5) for x in (last - last.mean())[::EVERY].tolist()],
    }
    return {"llama-cpp-python": str(theirs["version"]), "files": rows, "default": default}


def prepare(folder: Path, extra: list[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files to compare on, written into `folder`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import gguf_files as made
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from anchors.gguf.reading import read
    from anchors.gguf.tokens import PRE_TOKENIZERS
    from anchors.model.language import default_source

    default = read(Path(default_source()[0]))
    plain = {
        k: v for k, v in default.keys.items() if not k.startswith(("general.", f"{default.architecture}."))
    }
    plain |= {k.removeprefix("llama."): v for k, v in default.keys.items() if k.startswith("llama.")}
    tensors = {name: default.array(name) for name in default.tensors}
    whole = made.write(folder / "default-f32.gguf", default.architecture, plain, tensors)
    files = {default.path.name: default.path, f"{default.path.name}, weights as float32": whole}

    texts = [text for text in TEXTS if text.strip()] * 3
    words = made.sentencepiece_keys(texts)
    for name, (arch, config, keys, more) in made.variants().items():
        model = made.model(config)
        stated = made.stated(arch, config) | keys | words
        path = made.write(folder / f"{name}.gguf", arch, stated, made.laid_out(arch, model) | more)
        files[f"tiny {name}"] = path

    # Trained without borders: " 2024 and" may become one token where nothing cuts it.
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [text[start:] for text in texts for start in range(0, len(text), 3)],
        trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
        ),
    )
    borderless = PreTrainedTokenizerFast(tokenizer_object=raw)
    config = made.CONFIGS["llama"]
    vocabularies = {}
    for pre in PRE_TOKENIZERS:
        keys = made.stated("llama", config) | made.byte_level_keys(borderless, pre, words=len(borderless))
        path = made.write(
            folder / f"pre-{pre}.gguf", "llama", keys, {"token_embd.weight": np.zeros((1500, 32), "f4")}
        )
        vocabularies[f"pre-tokenizer {pre}"] = path
    words["tokenizer.ggml.tokens"][-3:] = ["<think>", "   ", "</think>"]
    words["tokenizer.ggml.token_type"][-3:] = [4, 4, 4]
    for name, prefix in (("with", True), ("without", False)):
        keys = made.stated("llama", config) | words | {"tokenizer.ggml.add_space_prefix": prefix}
        path = made.write(
            folder / f"{name}-prefix.gguf", "llama", keys, {"token_embd.weight": np.zeros((512, 32), "f4")}
        )
        vocabularies[f"SentencePiece with added words, {name} a space in front"] = path
    return files | {path.name: path for path in extra}, vocabularies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", help="a Python with llama-cpp-python")
    parser.add_argument("--file", type=Path, action="append", default=[], help="further GGUF files")
    parser.add_argument("--out", type=Path, help="where to write the numbers")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(*asked.worker)
        return
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as folder:
        result = compare(*prepare(Path(folder), asked.file), asked.llama)
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf")}
    # One line for each list of numbers.
    text = re.sub(r"\n +(-?[\d.]+,?)(?=\s)", r" \1", json.dumps(result, indent=1, ensure_ascii=False))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text + "\n")
    print(json.dumps(result["files"], indent=1))


if __name__ == "__main__":
    main()
