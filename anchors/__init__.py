"""label-anchors: look inside in-context learning.

    import anchors
    from anchors.flow import flow

    model = anchors.load()
    task = anchors.task("sst2")
    prompts = [d.prompt for d in anchors.draw(task, anchors.read(task), model.tokenizer, anchors.Draw(), 8)]
    flow(model, prompts).sums.s_wp

Names are imported on first use, so that the command line can show its help without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchors.attention.edits import Edit, ban
    from anchors.attention.seam import seam
    from anchors.errors import AnchorsError
    from anchors.models import LanguageModel, load
    from anchors.results import read_table
    from anchors.stats import flow_summary
    from anchors.tasks.data import read
    from anchors.tasks.drawing import Draw, draw
    from anchors.tasks.prompts import Prompt, build, from_text
    from anchors.tasks.task import Task, task

_HOMES = {
    "anchors.attention.edits": ("Edit", "ban"),
    "anchors.attention.seam": ("seam",),
    "anchors.errors": ("AnchorsError",),
    "anchors.models": ("LanguageModel", "load"),
    "anchors.results": ("read_table",),
    "anchors.stats": ("flow_summary",),
    "anchors.tasks.data": ("read",),
    "anchors.tasks.drawing": ("Draw", "draw"),
    "anchors.tasks.prompts": ("Prompt", "build", "from_text"),
    "anchors.tasks.task": ("Task", "task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnchorsError",
    "Draw",
    "Edit",
    "LanguageModel",
    "Prompt",
    "Task",
    "ban",
    "build",
    "draw",
    "flow_summary",
    "from_text",
    "load",
    "read",
    "read_table",
    "seam",
    "task",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anchors' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
