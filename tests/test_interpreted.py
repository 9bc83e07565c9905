"""What Triton's interpreter shows of the kernels where there is no CUDA device: tests of other files, in one process of their own,
for Triton reads `TRITON_INTERPRET` when it is imported."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import test_kernels
import test_nsa_flow
import test_nsa_kernels
import test_saliency_kernel
import torch
from gpu import INTERPRETED, needs_triton

SHOWN = {
    "test_kernels": ("tile_loop or declined or recognised or interpreted", len(test_kernels.TINY) + 3),
    "test_nsa_kernels": ("equations or interpreted", len(test_nsa_kernels.TINY) + 8),
    "test_nsa_decode": ("steps", 16),
    "test_nsa_texts": ("interpreted", 9),
    "test_nsa_padded": ("interpreted", 1),
    "test_nsa_flow": ("interpreted", len(test_nsa_flow.CASES) + 5),
    "test_saliency_kernel": ("test", len(test_saliency_kernel.TINY) + 4),
    "test_nsa_selection": ("test", 33),
    "test_nsa_bench": ("test", 6),
    "test_norms": ("test", 4),
}
"""By file: which of its tests, and how many these are."""


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="CUDA shows it all")
def test_the_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    chosen = " or ".join(f"({name} and ({which}))" for name, (which, _) in SHOWN.items())
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-rp",
            "-k",
            chosen,
            *(here / f"{n}.py" for n in SHOWN),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = Counter(
        Path(line.split("::")[0]).stem for line in run.stdout.splitlines() if line.startswith("PASSED ")
    )
    assert passed == {name: count for name, (_, count) in SHOWN.items()}
