"""What is changed in a model when it is put on the seam, so that it can be undone."""

from dataclasses import dataclass
from typing import Any

from torch import nn

ABSENT = object()
"""Stands for an attribute that the class gives and the module itself did not hold."""


@dataclass(frozen=True)
class Alteration:
    """One attribute of one module, before and after.

    Attributes:
        owner: the module.
        name: of the attribute.
        before: what stood in the module itself; `ABSENT` when it came from its class.
        after: what stands there now.
    """

    owner: nn.Module
    name: str
    before: Any
    after: Any

    @classmethod
    def of(cls, owner: nn.Module, name: str, after: Any) -> "Alteration":
        held = {**vars(owner), **owner._modules}
        return cls(owner, name, held.get(name, ABSENT), after)

    def do(self) -> None:
        setattr(self.owner, self.name, self.after)

    def undo(self) -> None:
        if self.before is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)
