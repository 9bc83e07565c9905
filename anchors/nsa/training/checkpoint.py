"""What a training leaves in its folder: the model as others load it, and what it takes to go on. No pickle anywhere.

OUT/config.json, model.safetensors, tokenizer.json …   the model of the last checkpoint
OUT/training/run.json                                  what the numbers depend on
OUT/training/state.safetensors                         weights, moments and step: one file, so one moment in time
OUT/training/log.parquet                               the log
"""

import copy
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchors.errors import AnchorsError, brief
from anchors.study.results import read_table, write_table, writing
from anchors.training import State, demand_own


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of one training."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "training" / "state.safetensors"

    @property
    def log(self) -> Path:
        return self.folder / "training" / "log.parquet"

    @property
    def identity(self) -> Path:
        return self.folder / "training" / "run.json"

    def check(self, identity: dict[str, Any]) -> None:
        """Raises:
        AnchorsError: the folder holds a training of another configuration, or files of something else.
        """
        model = any((self.folder / name).is_file() for name in ("config.json", "model.safetensors"))
        if model and not self.identity.is_file():
            raise AnchorsError(
                f"{str(self.folder)!r} holds a model that was not trained here; it would be overwritten.",
                "Choose another --out.",
                code="would-overwrite",
            )
        demand_own(self.identity, identity)

    def save(
        self,
        model: PreTrainedModel,
        state: State,
        step: int,
        log: pd.DataFrame,
        facts: dict[str, Any],
        unlogged: list[Tensor],
        *,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
    ) -> None:
        """Write log, state and model, in this order: rows past the state's step are dropped when going on."""
        write_table(self.log, log, facts | {"step": step})
        state.save(step, unlogged)
        self._publish(model, tokenizer, dtype)

    def rows(self, until: int) -> list[dict[str, Any]]:
        """The log up to a step."""
        if not until or not self.log.is_file():
            return []
        log, _ = read_table(self.log)
        return log[log["step"] <= until].to_dict(orient="records")

    def _publish(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> None:
        """Save the model beside its place and move it there file by file, the weights last."""
        shown = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
        draft = Path(tempfile.mkdtemp(dir=self.folder, prefix=".model-"))
        try:
            with writing(self.folder):
                shown.save_pretrained(draft)
                tokenizer.save_pretrained(draft)
                for path in sorted(draft.iterdir(), key=lambda p: p.suffix == ".safetensors"):
                    path.chmod(0o644)  # some are written as private files
                    path.replace(self.folder / path.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise AnchorsError(
            f"{folder} holds no model to begin with.",
            "Give the folder of a finished training.",
            code="model-not-found",
        )
    return path


def digest(folder: Path) -> str:
    """Sixteen hex digits over the weights of a saved model."""
    return hashlib.sha256(_weights(folder).read_bytes()).hexdigest()[:16]


def begin(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the weights of a saved one of the same kind and size.

    Raises:
        AnchorsError: there is none, it cannot be read, or it is of another kind or size.
    """
    try:
        missing, unexpected = model.load_state_dict(load_file(_weights(folder)), strict=False)
    except (OSError, SafetensorError) as error:
        raise AnchorsError(
            f"The weights in {folder} cannot be read: {brief(error)}",
            "The file was cut short or damaged: give the folder of a finished training.",
            code="model-broken",
        ) from error
    except RuntimeError as error:
        raise AnchorsError(
            f"The model in {folder} has other sizes: {error}",
            "Give the same --layers, --width, …",
            code="other-run",
        ) from error
    # Tied weights are stored once.
    missing = [name for name in missing if name not in (model._tied_weights_keys or {})]
    if missing or unexpected:
        raise AnchorsError(
            f"The model in {folder} is of another kind: without {missing[:3]}, with {list(unexpected)[:3]}.",
            "Give the same --attention and --phi.",
            code="other-run",
        )
    model.tie_weights()
