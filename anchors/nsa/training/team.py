"""The processes of a training: one, or those that `accelerate launch` started."""

import os

import torch
from torch import Tensor, nn

from anchors.errors import AnchorsError


class Team:
    """The processes of a training; here just this one."""

    rank, size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def made(device: str) -> "Team":
        """One process, or those of `accelerate launch`.

        Raises:
            AnchorsError: there is no such device here.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return Several()
        from anchors.model.routed import placed

        return Team(placed(device, "auto")[0])

    @property
    def name(self) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over all processes."""
        return model

    def total(self, own: Tensor) -> Tensor:
        """The sum over all processes."""
        return own

    def wait(self) -> None:
        """Until all are here."""


class Several(Team):
    """Processes that accelerate started."""

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise AnchorsError(
                "Several processes need accelerate.",
                "pip install 'label-anchors[train]', or start just one.",
                code="package",
            ) from error
        # bf16 is this module's own business, as in a single process.
        self.accelerator = Accelerator(mixed_precision="no")
        super().__init__(self.accelerator.device)
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes

    def wrap(self, model: nn.Module) -> nn.Module:
        return self.accelerator.prepare(model)

    def total(self, own: Tensor) -> Tensor:
        return self.accelerator.reduce(own, "sum")

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
