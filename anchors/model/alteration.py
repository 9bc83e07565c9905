"""What is changed in a model when it is put on the seam, so that it can be undone."""

from dataclasses import dataclass
from typing import Any

from torch import nn

ABSENT = object()
"""Stands for an attribute that the module itself does not hold, so that what its class gives is found."""


@dataclass(frozen=True)
class Alteration:
    """One attribute of one module, before and after.

    Attributes:
        owner: the module.
        name: of the attribute.
        before: what stood in the module itself, or `ABSENT`.
        after: what stands there now, or `ABSENT`.
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
        self._put(self.after)

    def undo(self) -> None:
        self._put(self.before)

    def _put(self, value: Any) -> None:
        if value is not ABSENT:
            setattr(self.owner, self.name, value)
        elif self.name in {**vars(self.owner), **self.owner._modules}:
            delattr(self.owner, self.name)
