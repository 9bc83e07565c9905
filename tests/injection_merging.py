"""What the tests of merging on disk share: models, and their files opened, compared and spoilt."""

import shutil
from pathlib import Path

import pytest
import torch
from injection_families import Saved, saved
from safetensors.torch import save_file

from anchors.injection.merging.checkpoint import SINGLE, Checkpoint
from anchors.injection.merging.merge import MergeReport, merge
from anchors.injection.merging.recipe import Recipe

BF16, SHARD = torch.bfloat16, "20KB"


def run(models: Saved, out: Path, recipe: Recipe | None = None, **more: object) -> MergeReport:
    return merge(models.vlm, models.expert, models.base, recipe or Recipe(strength=0.5), out, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def nothing_at(out: Path) -> bool:
    """Neither OUT nor a draft of it."""
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))


@pytest.fixture(scope="module")
def models() -> Saved:
    return saved("llava", BF16, SHARD)


@pytest.fixture
def copies(models: Saved, tmp_path: Path) -> Saved:
    """Folders that may be spoilt."""
    folders = {role: tmp_path / role for role in ("vlm", "base", "expert")}
    for role, folder in folders.items():
        shutil.copytree(getattr(models, role), folder)
    return Saved(**folders)


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a model."""
    held = {name: tensor.clone() for name, tensor in weights(folder).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(change(held), folder / SINGLE)
