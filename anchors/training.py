"""Train step by step: one loop for whatever is trained here, in one process or in several, that goes on where it was broken off.

A loss is made of sums over the rows of a batch. Several processes take a share of the rows each; the sums are added up
before a mean is taken of them, so that the gradient is that of the whole batch, however unequal the shares are.
`accelerate launch` or `torchrun` starts them, and accelerate says which device is whose; torch averages the gradients.
Of accelerate's own checkpoints none is written or read: they are pickles.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from anchors.errors import AnchorsError, brief, parsed
from anchors.model.routed import placed
from anchors.pace import Interrupted, between_steps
from anchors.study.results import write_atomic

LARGEST = torch.finfo(torch.float32).max


def arithmetic(device: torch.device) -> AbstractContextManager:
    """bf16 products on CUDA; the weights stay float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def described(path: Path) -> dict[str, Any]:
    """What a file of a training says of itself.

    Raises:
        AnchorsError: it cannot be read.
    """
    try:
        found = parsed(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise AnchorsError(
            f"{str(path)!r} does not describe a training: {brief(error)}.",
            f"Delete {str(path.parent)!r} to begin again, or choose another --out.",
            code="file-unreadable",
        ) from error
    return found


def demand_own(path: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with a training of another configuration.

    Args:
        path: where `claim` wrote down what the training is; without it nothing is there yet.
        identity: all that the numbers depend on.

    Raises:
        AnchorsError: it is another one; the file cannot be read.
    """
    if not path.is_file():
        return
    before = described(path)
    differing = _differences({name: before.get(name) for name in identity}, json.loads(json.dumps(identity)))
    if differing:
        name, old, new = differing[0]
        more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise AnchorsError(
            f"{str(path)!r} is of a training with {name} = {old}, not {new}{more}.",
            "Choose another --out, or give the same options to go on with that one.",
            code="other-run",
        )


def _differences(one: Any, other: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [(name, one, other)]
    found = []
    for key in sorted(set(one) | set(other)):
        found += _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    return found


def claim(path: Path, facts: dict[str, Any]) -> None:
    """Write down what a training is, once."""
    if not path.is_file():
        text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
        write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))


class Team:
    """The processes of a training; here just this one.

    Attributes:
        device: of this process.
        rank: which one this is; the first one writes.
        size: how many there are.
    """

    rank, size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def made(device: str) -> "Team":
        """One process, or those of `accelerate launch` or `torchrun`.

        Args:
            device: auto, cpu, cuda, cuda:1, mps; of several processes each has its own card, or all have the CPU.

        Raises:
            AnchorsError: there is no such device here; it is one card for several processes; accelerate is not installed.
        """
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return Several(device) if several else Team(placed(device, "auto")[0])

    @property
    def name(self) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of the rows of a batch are this process's.

        Raises:
            AnchorsError: there are fewer than processes.
        """
        if count < self.size:
            raise AnchorsError(
                f"A batch of {count} cannot be divided among {self.size} processes.",
                f"Start at most {count}.",
                code="option-value",
            )
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over all processes."""
        return model

    def total(self, own: Tensor) -> Tensor:
        """The sum over all processes."""
        return own

    def wait(self) -> None:
        """Until all are here."""

    def demand_same(self, number: int, what: str) -> None:
        """Raises:
        AnchorsError: the processes have different numbers: they would do different things, and wait for each other for ever.
        """
        added, squares = self.total(torch.tensor([number, number**2], device=self.device)).tolist()
        if squares * self.size != added**2:
            raise AnchorsError(
                f"The processes do not see the same {what}: {number} here.",
                "Give a folder that all machines share.",
                code="other-run",
            )

    def ending(self, number: int, waiting: bool) -> int:
        """The signal that ends a training after this step, 0 for none; several processes agree where they wait anyway."""
        return number


class Several(Team):
    """Processes that a launcher started."""

    def __init__(self, device: str = "auto") -> None:
        where, count = placed(device, "auto")[0], os.environ.get("WORLD_SIZE", "1")
        try:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env
        except ImportError as error:
            raise AnchorsError(
                "Several processes need accelerate.",
                "pip install 'label-anchors[train]', or start just one.",
                code="package",
            ) from error
        if where.index is not None:
            raise AnchorsError(
                f"{count} processes cannot all train on {where}.",
                "Leave --device out: each has its own card; CUDA_VISIBLE_DEVICES chooses which there are.",
                code="device",
            )
        # Only where they are and which device is whose: precision, sharding and compiling are no business of a launcher's here.
        state = PartialState(cpu=where.type != "cuda" or parse_flag_from_env("ACCELERATE_USE_CPU"))
        super().__init__(state.device)
        self.rank, self.size = state.process_index, state.num_processes
        if self.size != int(count):
            raise AnchorsError(
                f"{count} processes were started, but they do not find each other.",
                "Start them with `accelerate launch` or `torchrun`.",
                code="device",
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(
            model, [self.device] if self.device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def total(self, own: Tensor) -> Tensor:
        found = own.clone()
        torch.distributed.all_reduce(found)
        return found

    def wait(self) -> None:
        self.total(torch.zeros((), device=self.device)).item()

    def ending(self, number: int, waiting: bool) -> int:
        asked = waiting and self.total(torch.tensor(float(number), device=self.device)) > 0
        return (number or signal.SIGTERM) if asked else 0


@dataclass(frozen=True)
class State:
    """From where a training goes on: weights, moments, steps done, in one file and so of one moment. No pickle.

    Attributes:
        path: of the file.
        parameters: what is trained, by name.
        optimizer: over all of them.
        mend: what to try when the training diverges.
    """

    path: Path
    parameters: Mapping[str, nn.Parameter]
    optimizer: AdamW
    mend: str

    def restore(self) -> tuple[int, Float[Tensor, "unseen sums"]]:
        """Put weights and moments back; returns the steps done, and of the last of them the sums that were kept with them.

        Without a file these are 0 and none.

        Raises:
            AnchorsError: the file cannot be read, or does not fit the model.
        """
        if not self.path.is_file():
            return 0, torch.zeros(0, 1)
        fused = self.optimizer.param_groups[0]["fused"]
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file, torch.no_grad():
                step = int(file.metadata()["step"])
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"weight/{name}"))
                    self.optimizer.state[parameter] = {
                        # A fused optimizer counts steps on the device.
                        "step": torch.tensor(float(step), device=parameter.device if fused else "cpu"),
                        "exp_avg": file.get_tensor(f"first/{name}").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"second/{name}").to(parameter.device),
                    }
                return step, file.get_tensor("unlogged") if "unlogged" in file.keys() else torch.zeros(0, 1)  # noqa: SIM118 - not a dict
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise AnchorsError(
                f"The checkpoint {str(self.path)!r} cannot be used: {brief(error)}.",
                "Delete it: what it is of begins again.",
                code="file-unreadable",
            ) from error

    def save(self, step: int, unseen: list[Tensor]) -> None:
        """Write all that it takes to go on after a step.

        Raises:
            AnchorsError: the file cannot be written.
        """
        tensors = {"unlogged": torch.stack(unseen)} if unseen else {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"weight/{name}": parameter.detach(), f"first/{name}": moments["exp_avg"]}
            tensors[f"second/{name}"] = moments["exp_avg_sq"]
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        write_atomic(self.path, lambda draft: save_file(tensors, draft, metadata={"step": str(step)}))

    def demand_finite(self, values: Float[np.ndarray, "steps sums"], first: int) -> None:
        """Refuse sums that are no numbers, of steps after the first ones."""
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise self._diverged("Loss or gradient is not finite", first + int(bad[0]) + 1)

    def demand_sound(self, step: int) -> None:
        """Refuse weights that are no numbers, or so large that their squares are infinite."""
        if not all(
            float(p.detach().abs().amax()) < LARGEST**0.5 for p in self.parameters.values() if p.numel()
        ):
            raise self._diverged("Weights are not finite, or huge,", step)

    @contextmanager
    def diverging(self, step: int) -> Generator[None]:
        """A model that ran before refuses only numbers that are none, and cannot know that a learning rate is behind them."""
        try:
            yield
        except AnchorsError as error:
            raise self._diverged("The model's own numbers are not finite", step) from error

    def _diverged(self, what: str, step: int) -> AnchorsError:
        kept = "The last checkpoint is kept" if self.path.is_file() else "There is no checkpoint yet"
        return AnchorsError(
            f"The training diverged. {what} at step {step}.", f"{kept}; {self.mend}.", code="diverged"
        )


class _Sums(nn.Module):
    """A step's sums as the forward pass of a module, which is where several processes put their hooks."""

    def __init__(self, parameters: Iterable[nn.Parameter], sums: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.own, self.sums = nn.ParameterList(parameters), sums

    def forward(self, step: int) -> Tensor:
        return self.sums(step)


def take_steps(
    state: State,
    sums: Callable[[int], Float[Tensor, " sums"]],
    loss: Callable[[Float[Tensor, " sums"], Float[Tensor, " sums"]], Float[Tensor, ""]],
    rates: Callable[[int], Iterable[float]],
    *,
    steps: int,
    clip: float,
    team: Team,
    start: tuple[int, Tensor],
    due: Callable[[int], bool],
    look: Callable[[int, Float[np.ndarray, "since sums+1"], float], None],
    save: int,
    keep: Callable[[int, list[Tensor]], None],
    told: Callable[[int], object],
    kept: str = "step {} of {} is kept",
) -> None:
    """Take the steps that are left.

    SIGINT and SIGTERM end it after the step that it is in, with a checkpoint of that step; of several processes after the
    next look.

    Args:
        state: what is trained.
        sums: of a step, over this process's rows.
        loss: from the sums of this process, with their gradient, and those of all: linear in the former.
        rates: the learning rate of each of the optimizer's groups at a step.
        steps: how many in all.
        clip: longest gradient.
        team: the processes.
        start: what `State.restore` gave.
        due: whether to look after so many steps; after the last one in any case.
        look: told the steps done, of each step since the last look the sums of all processes and the gradient's length, and
            the steps a second.
        save: steps between checkpoints.
        keep: makes one, of so many steps, with the sums since the last look; asked of every process.
        told: hears of every step that is done.
        kept: what an interruption leaves, with places for the steps done and all steps.

    Raises:
        AnchorsError: the training diverges, or the processes do not see the same checkpoint.
        Interrupted: a signal asked for the end; says which step is kept.
    """
    done, unseen = start
    team.demand_same(done, "checkpoint")
    model, parameters = team.wrap(_Sums(state.parameters.values(), sums)), [*state.parameters.values()]
    measured = [*unseen.to(team.device)]
    told(done)
    began, ran = time.perf_counter(), 0
    with between_steps(twice=team.size == 1) as asked:
        for step in range(done, steps):
            for group, rate in zip(state.optimizer.param_groups, rates(step), strict=True):
                group["lr"] = rate
            with state.diverging(step + 1) if step > done else nullcontext():
                own = model(step)
            total = team.total(own.detach())
            state.optimizer.zero_grad(set_to_none=True)
            # A mean over processes is taken of the gradients.
            (team.size * loss(own, total)).backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            state.optimizer.step()
            measured.append(torch.cat([total, norm.detach().reshape(1).to(total)]))
            now, last, ran = step + 1, step + 1 == steps, ran + 1
            waiting = last or due(now)
            if waiting:  # every look at a number makes a GPU wait
                values = torch.stack(measured).cpu().double().numpy()
                seconds = time.perf_counter() - began
                state.demand_finite(values, now - len(values))
                with state.diverging(now):
                    look(now, values, ran / max(seconds, 1e-9))
                measured.clear()
            number = 0 if last else team.ending(asked(), waiting)
            if now % save == 0 or last or number:
                state.demand_sound(now)
                keep(now, measured)
            if not measured:
                began, ran = time.perf_counter(), 0
            told(now)
            if number:
                team.wait()
                raise Interrupted(number, kept.format(now, steps) + "; the same command goes on from there.")
    team.wait()
