"""What a precision costs: the flow and the answers of a few prompts, beside those in float32 on the same device.

    uv run benchmarks/precision_error.py -m MODEL -d DATASETS --precision tf32 -n 8

Printed by task: the largest difference of a share of S_wp, S_pq and S_ww (of the means over the prompts, any layer), of a label's
probability, and how many predictions are the same.
"""

import argparse
import json

import torch

import anchors
from anchors.flow.saliency import Flow, flow
from anchors.stats import SUMS
from anchors.tasks.drawing import Draw, draw


def shares(found: Flow) -> torch.Tensor:
    """Sums × layers: the share of each, of means over prompts."""
    means = torch.stack([getattr(found.sums, name).double().mean(0) for name in SUMS])
    return means / means.sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model")
    parser.add_argument("-d", "--data", default="builtin")
    parser.add_argument("-n", "--examples", type=int, default=8)
    parser.add_argument("--task", default="sst2,trec,agnews")
    parser.add_argument("--precision", default="tf32")
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    found: dict[str, dict[str, Flow]] = {}
    for precision in ("float32", asked.precision):
        model = anchors.load(asked.model, precision=precision, device=asked.device)
        for name in asked.task.split(","):
            task = anchors.task(name)
            drawn = draw(task, anchors.read(task, asked.data), model.tokenizer, Draw(), asked.examples)
            found.setdefault(name, {})[precision] = flow(model, [d.prompt for d in drawn])
        del model
    told = {}
    for name, both in found.items():
        one, other = both.values()
        told[name] = {
            "share": float((shares(one) - shares(other)).abs().max()),
            "probability": float((one.probabilities - other.probabilities).abs().max()),
            "same_predictions": float(
                (one.probabilities.argmax(-1) == other.probabilities.argmax(-1)).double().mean()
            ),
            "prompts": len(one.loss),
        }
    print(json.dumps({"model": asked.model, "precision": asked.precision, "apart": told}, indent=1))


if __name__ == "__main__":
    main()
