"""Architectures that transformers does not have: modules that make one known to it when they are imported."""

from functools import cache
from importlib import import_module

MODULES = ("anchors.nsa.model",)


@cache
def known() -> None:
    """Let transformers' Auto classes load models of `MODULES`, too."""
    for name in MODULES:
        import_module(name)
