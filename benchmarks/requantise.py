"""A GGUF file's weights written anew in other types of numbers, by gguf's own quantisers (`gguf.quants`).

    uv run benchmarks/requantise.py --types F32,Q8_0,Q4_1,Q4_0 --out OUT
    uv run anchors run quantisation -m OUT/SmolLM2-135M-Instruct.Q8_0.gguf -d DATASETS …

Every tensor that the file holds in a quantised type is turned into float32 and quantised anew, all but those to `--keep`: the token
embedding, which in 4-bit files of llama.cpp has more bits than the rest. The others stay as they are, and so do all keys. The reference is the file itself: what its own quantisation lost cannot be known from it. gguf quantises to
Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1; of K-quants it only reads.

Printed are the types of the file and, for each new one, ‖w' − w‖ / ‖w‖ over all tensors that are quantised.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import gguf
import numpy as np

PLAIN = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16}


def requantise(
    source: Path, kind: gguf.GGMLQuantizationType, target: Path, keep: frozenset[str] = frozenset()
) -> float:
    """Write `source` with its quantised tensors in `kind`, all but those to `keep`.

    Returns:
        ‖w' − w‖ / ‖w‖ over these tensors, 0 where none is changed.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        several = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if several else None)
    gap = size = 0.0
    for tensor in reader.tensors:
        if tensor.tensor_type in PLAIN or tensor.name in keep:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stored = gguf.quantize(weights, kind)
        gap += float(np.square(gguf.dequantize(stored, kind) - weights, dtype=np.float64).sum())
        size += float(np.square(weights, dtype=np.float64).sum())
        writer.add_tensor(tensor.name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return math.sqrt(gap / size) if size else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a GGUF file; by default that of the default model")
    parser.add_argument("--types", default="F32,Q8_0,Q4_1,Q4_0", help="of the files to write, with commas")
    parser.add_argument(
        "--keep", default="token_embd.weight", help="tensors that stay as they are, with commas"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    asked = parser.parse_args()
    if asked.file is None:
        from anchors.model.language import default_source

        asked.file = Path(default_source()[0])
    asked.out.mkdir(parents=True, exist_ok=True)
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(asked.file).tensors)
    lost = {
        name: requantise(
            asked.file,
            gguf.GGMLQuantizationType[name],
            asked.out / f"{asked.file.name.split('.')[0]}.{name}.gguf",
            frozenset(asked.keep.split(",")),
        )
        for name in asked.types.split(",")
    }
    told = {name: float(f"{error:.3g}") for name, error in lost.items()}
    print(json.dumps({"file": asked.file.name, "types": types, "relative_error_of_weights": told}, indent=1))


if __name__ == "__main__":
    main()
