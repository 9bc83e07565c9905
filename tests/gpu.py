"""What tests of kernels need: a CUDA device, Triton, or the process that Triton's interpreter runs in."""

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_cuda = pytest.mark.cuda
"""All of them on one card: `uv run benchmarks/cuda_tests.py`."""
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_interpreted")
