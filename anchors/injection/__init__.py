"""Cross-modal skill injection: put an expert LLM's skill into a vision-language model without training.

    from anchors.injection import Recipe, TaskVectors, inject, load_vlm
    from anchors.injection.merge import merge

    report = merge("llava", "expert", "llm", Recipe("task-arithmetic", strength=0.5), "out")    # disk to disk, streaming

    vectors = TaskVectors.of(vlm, base, expert)                                                  # in memory, reversible
    with inject(vlm, vectors, "dare", 0.5, density=0.5) as injected:
        ...

`anchors.injection.evaluate`, `.sweep`, `.flow_report` and `.demo` stand behind the verbs of `anchors inject`. Names are imported on first
use.

Source: Xu et al., "Investigating Cross-Modal Skill Injection" (ACL 2026), and the methods' own papers (`METHODS`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchors.injection.inspection import inspect
    from anchors.injection.mapping import tower
    from anchors.injection.memory import TaskVectors, inject
    from anchors.injection.methods import METHODS
    from anchors.injection.recipe import Recipe, merge_tensor
    from anchors.injection.suite import Suite
    from anchors.injection.vlm import load_vlm

_HOMES = {
    "inspection": ("inspect",),
    "mapping": ("tower",),
    "memory": ("TaskVectors", "inject"),
    "methods": ("METHODS",),
    "recipe": ("Recipe", "merge_tensor"),
    "suite": ("Suite",),
    "vlm": ("load_vlm",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "Recipe",
    "Suite",
    "TaskVectors",
    "inject",
    "inspect",
    "load_vlm",
    "merge_tensor",
    "tower",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anchors.injection' has no attribute {name!r}")
    return getattr(import_module(f"anchors.injection.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
