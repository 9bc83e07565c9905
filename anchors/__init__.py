"""label-anchors: look inside in-context learning.

    import anchors

    model, task = anchors.load(), anchors.task("sst2")
    data = anchors.read(task)
    found = anchors.measure(model, anchors.Isolation(), task, data, anchors.Sample(examples=50))
    found.tables()["summary"]

Names are imported on first use, so that the command line can show its help without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchors.attention.edits import Edit, ban, isolate, scale
    from anchors.attention.seam import seam
    from anchors.causal import Causal
    from anchors.compression import AnchorCache, Compression, Speed
    from anchors.diagnosis import Diagnosis
    from anchors.errors import AnchorsError
    from anchors.flow.analysis import FlowMap, InformationFlow
    from anchors.icl import Classification
    from anchors.isolation import Isolation, TopWords
    from anchors.models import LanguageModel, load
    from anchors.readout import Readout
    from anchors.results import read_table
    from anchors.reweighting import Beta, Reweighting
    from anchors.runner import Measured, Sample, measure
    from anchors.stats import flow_summary, summarise
    from anchors.summaries import SUMMARIES, sentence
    from anchors.tasks.data import read
    from anchors.tasks.drawing import Draw, draw
    from anchors.tasks.prompts import Prompt, build, from_text
    from anchors.tasks.task import Task, task

_HOMES = {
    "anchors.attention.edits": ("Edit", "ban", "isolate", "scale"),
    "anchors.attention.seam": ("seam",),
    "anchors.causal": ("Causal",),
    "anchors.compression": ("AnchorCache", "Compression", "Speed"),
    "anchors.diagnosis": ("Diagnosis",),
    "anchors.errors": ("AnchorsError",),
    "anchors.flow.analysis": ("FlowMap", "InformationFlow"),
    "anchors.icl": ("Classification",),
    "anchors.isolation": ("Isolation", "TopWords"),
    "anchors.models": ("LanguageModel", "load"),
    "anchors.readout": ("Readout",),
    "anchors.results": ("read_table",),
    "anchors.reweighting": ("Beta", "Reweighting"),
    "anchors.runner": ("Measured", "Sample", "measure"),
    "anchors.stats": ("flow_summary", "summarise"),
    "anchors.summaries": ("SUMMARIES", "sentence"),
    "anchors.tasks.data": ("read",),
    "anchors.tasks.drawing": ("Draw", "draw"),
    "anchors.tasks.prompts": ("Prompt", "build", "from_text"),
    "anchors.tasks.task": ("Task", "task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SUMMARIES",
    "AnchorCache",
    "AnchorsError",
    "Beta",
    "Causal",
    "Classification",
    "Compression",
    "Diagnosis",
    "Draw",
    "Edit",
    "FlowMap",
    "InformationFlow",
    "Isolation",
    "LanguageModel",
    "Measured",
    "Prompt",
    "Readout",
    "Reweighting",
    "Sample",
    "Speed",
    "Task",
    "TopWords",
    "ban",
    "build",
    "draw",
    "flow_summary",
    "from_text",
    "isolate",
    "load",
    "measure",
    "read",
    "read_table",
    "scale",
    "seam",
    "sentence",
    "summarise",
    "task",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("label-anchors")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anchors' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
