"""The model `tiny-vlm` that comes with the package, from a demonstration that was built before.

    anchors inject demo --scale tiny-patches --no-upper --device cpu --out DEMO
    python tiny_vlm.py DEMO FOLDER

Weights are stored in float16, and are float32 again where they are loaded. Questions and demonstrations are about digits
that no part of the model was trained on.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from anchors.injection.asking.evaluate import prepare, score
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import load_vlm

ASKED, SHOWN = ("name", "even", "big"), 3
"""A question of each kind, and so many demonstrations of the first."""


def write(demo: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(demo / "vlm", dtype=torch.float32)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.name_or_path = ""  # a folder of the machine it was made on
    model.to(torch.float16).save_pretrained(folder)
    AutoProcessor.from_pretrained(demo / "vlm").save_pretrained(folder)
    suite = Suite.open(demo / "suite")
    test, shown = suite.examples("vision", "test"), suite.examples("vision", "demonstration")
    taken = [next(e for e in test if e.kind == kind) for kind in ASKED]
    first = {e.answer: e for e in reversed(shown) if e.kind == ASKED[0] and e.answer != taken[0].answer}
    for name, chosen in (("questions", taken), ("demonstrations", list(first.values())[-SHOWN:])):
        lines = []
        for number, example in enumerate(chosen):
            image = f"{name}-{number}.png"
            shutil.copy(example.image, folder / image)
            lines.append(
                json.dumps({"image": image, "question": example.question, "answer": example.answer}) + "\n"
            )
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    vlm = load_vlm(folder)
    accuracy = score(vlm, prepare(vlm, suite, test, batch=100))["correct"].mean()
    made = json.loads((demo / "demo.json").read_text(encoding="utf-8"))
    facts = {
        "what": "A LLaVA of random beginnings that names handwritten digits, and says whether they are even or big.",
        "pictures": "scikit-learn's load_digits (UCI, Optical Recognition of Handwritten Digits, CC BY 4.0), to 16 × 16 pixels",
        "commands": [line.strip() for line in __doc__.split("\n") if line.startswith("    ")],
        "weights": "float16",
        "accuracy on held-out digits": round(float(accuracy), 4),
        "questions": len(test),
        **{key: made[key] for key in ("scale", "seed", "versions") if key in made},
    }
    (folder / "provenance.json").write_text(
        json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
