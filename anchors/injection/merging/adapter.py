"""A LoRA folder of peft as an expert: the model it was trained on, and what the adapter adds to each of its matrices.

    W' = W + s·B·A                          s = α/r, or α/√r (`use_rslora`); r and α also by module (patterns)
    W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖      DoRA: m and the norm are those of rows, one for each output
    E' = E + s·(B·A)ᵀ                        of an embedding
    W' as stored                            `modules_to_save`, trained biases, an embedding saved along

In float32, a tensor at a time, and not by peft's own merge, which adds the delta of a tied head twice (0.21.2). A head that
is tied to the embedding, one of which the adapter changes, is a head of its own then, as in peft's forward pass.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchors.errors import AnchorsError
from anchors.injection.merging.checkpoint import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    Checkpoint,
    located,
    opened,
    read_json,
)
from anchors.places import require_inside

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<low>lora_(?:embedding_)?[AB])(?:\.(?P<what>weight|bias))?|(?P<dora>lora_magnitude_vector)(?:\.weight)?"
    r"|(?:base_layer\.|modules_to_save\.)?(?P<whole>weight|bias))"
)
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout", "bias", "lora_bias",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
"""Options that are followed here, or that change nothing once the adapter is trained (peft itself takes `fan_in_fan_out`
back on linear layers, which all are here)."""
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin that leave the base as it is."""
_EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor.

    Attributes:
        whole: name, in the adapter, of what stands in the tensor's place; None where the base's stays.
        low: names of A and B.
        scale: s of their product.
        magnitude: name of DoRA's m.
        turned: whether the product is of an embedding.
    """

    whole: str | None = None
    low: tuple[str, str] | None = None
    scale: float = 0.0
    magnitude: str | None = None
    turned: bool = False


@dataclass(frozen=True)
class Adapted(Checkpoint):
    """A model with an adapter on it, tensor by tensor.

    Attributes:
        base: the model that the adapter was trained on.
        lora: the adapter's own tensors.
        changes: by name of the base's tensor (of a stacked expert, its matrix).
        tied: the embedding where the head, tied to it in the base, is one of its own here.
    """

    base: Checkpoint = field(kw_only=True, repr=False)
    lora: Checkpoint = field(kw_only=True, repr=False)
    changes: Mapping[str, Change] = field(kw_only=True, repr=False)
    tied: str | None = field(default=None, kw_only=True)

    def weight(self, name: str) -> Tensor:
        """A tensor of the model with its adapter, in float32 where the adapter changes it."""
        change = self.changes.get(name)
        if change is None or change.whole is None:
            whole = self.base.weight(self.tied if self.tied and name == HEAD else name)
        else:
            whole = self.lora.weight(change.whole)
        if change is None:
            return whole
        whole = whole.float()
        if change.low is None:
            return whole
        a, b = (self.lora.weight(part).float() for part in change.low)
        if b.dim() == 1:  # of a bias
            return whole + change.scale * b
        delta = change.scale * (b @ a)
        whole = whole + (delta.T if change.turned else delta)
        if change.magnitude is not None:
            m = self.lora.weight(change.magnitude).float()
            whole = whole * (m / torch.linalg.vector_norm(whole, dim=1))[:, None]
        return whole

    def tensor(self, name: str) -> Tensor:
        """The same as `weight`: nothing of it lies on disk."""
        return self.weight(name)

    @cached_property
    def fingerprint(self) -> str:
        both = f"{self.base.fingerprint} {self.lora.fingerprint}"
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def stamp(self) -> dict[str, Any]:
        return {"base": self.base.stamp(), "adapter": self.lora.stamp()}


def open_expert(
    source: str | Path | Checkpoint, base: str | Path | Checkpoint | None = None, revision: str | None = None
) -> Checkpoint:
    """Open an expert: a whole model, or a LoRA folder with what it was trained on.

    The adapter is put on the model that lies beside it, else on the one its configuration names if that is a folder of
    this machine, else on `base`; a note says where that is another one than the adapter names.

    Args:
        source: directory or hub id.
        base: the model that the expert was made from; None is the one that the adapter names.
        revision: branch, tag or commit of a hub model.

    Raises:
        AnchorsError: it cannot be read; the adapter is of a kind that is not understood here, is not whole, or does not
            fit the base; there is no base.
    """
    if isinstance(source, Checkpoint):
        return source
    folder, commit = located(source, revision)
    if not (folder / ADAPTER).is_file():
        return Checkpoint.open(source, revision)
    lora = _opened(str(source), folder, commit)
    _require_known(lora)
    named = lora.config.get("base_model_name_or_path")
    notes: tuple[str, ...] = ()
    if (folder / "config.json").is_file():
        own = Checkpoint.whole(str(source), folder, commit)
    elif isinstance(named, str) and named and Path(named).is_dir():
        own = Checkpoint.open(named)
    elif base is not None:
        own = Checkpoint.open(base)
        if str(named) != own.name:
            notes = (f"The adapter {lora.name!r} names {named!r} as its base; it was put on {own.name!r}.",)
    else:
        raise AnchorsError(
            f"The adapter {lora.name!r} belongs to {named!r}, which is no folder here.",
            "Give the model it was trained on as --base.",
            code="adapter",
        )
    return _adapted(lora, own, notes)


def _opened(name: str, folder: Path, commit: str | None) -> Checkpoint:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise AnchorsError(
            f"The adapter {name!r} has no {ADAPTER_WEIGHTS}.",
            "Pickles can run code when opened and are not read: load the adapter with peft where you trust it, and save it "
            "again.",
            code="adapter",
        )
    require_inside(folder, [file])
    handle, entries = opened(file)
    config = read_json(folder / ADAPTER, "Give the folder that peft's save_pretrained wrote.")
    return Checkpoint(name, folder, entries, config, commit, {file: handle})


def _require_known(lora: Checkpoint) -> None:
    """Refuse what computes otherwise than the equations above."""
    config = lora.config
    kind = str(config.get("peft_type")).upper()
    odd = [name for name, value in config.items() if value and name not in _HARMLESS]
    initial = config.get("init_lora_weights", True)
    why = None
    if kind != "LORA":
        why = f"is of the kind {kind}"
    elif odd:
        why = f"has {odd[0]} = {config[odd[0]]!r}, which is more than a change of single matrices by low rank"
    elif initial not in _INITIAL:
        why = f"began with init_lora_weights = {initial!r}, which changed the base, too: its tensors do not say how"
    if why:
        raise AnchorsError(
            f"The adapter {lora.name!r} {why}.",
            "Plain LoRA, rsLoRA and DoRA are read; else load base and adapter with peft, merge_and_unload, save the whole "
            "model and give that.",
            code="adapter",
        )


def _adapted(lora: Checkpoint, base: Checkpoint, notes: tuple[str, ...]) -> Adapted:
    shapes: dict[str, Sequence[int]] = dict(base.apart.shapes)
    fields: dict[str, dict[str, Any]] = defaultdict(dict)
    unknown, absent = [], []
    embedding = next((name for name in shapes if name.endswith(_EMBEDDING)), None)
    tied = embedding if HEAD not in shapes else None
    for key in lora.entries:
        found = _KEY.fullmatch(key.removeprefix(_PREFIX)) if key.startswith(_PREFIX) else None
        if found is None:
            unknown.append(key)
            continue
        bias = "bias" in (found["what"], found["whole"])
        name = f"{found['module']}.{'bias' if bias else 'weight'}"
        if name not in shapes and not (name == HEAD and tied):
            absent.append(key)
        elif found["dora"]:
            fields[name]["magnitude"] = key
        elif found["whole"]:
            fields[name]["whole"] = key
        else:
            fields[name][found["low"][-1]] = key
            fields[name]["turned"] = "embedding" in found["low"]
            fields[name]["scale"] = _scale(lora, found["module"], lora.shapes, key)
    for name, own in fields.items():
        # A bias of the second factor alone.
        if name.endswith(".bias") and "B" in own:
            own["A"] = own["B"]
    halves = [own.get("A", own.get("B")) for own in fields.values() if ("A" in own) != ("B" in own)]
    lonely = [
        own["magnitude"]
        for own in fields.values()
        if "magnitude" in own and ("A" not in own or own["turned"])
    ]
    for keys, what in (
        (unknown, "has tensors that are not understood"),
        (absent, f"changes what {base.name!r} does not have"),
        (halves, "has one factor without the other"),
        (lonely, "has magnitudes where there is no matrix of a linear layer"),
        ([] if fields else [ADAPTER_WEIGHTS], "changes nothing"),
    ):
        if keys:
            raise AnchorsError(
                f"The adapter {lora.name!r} {what}: {', '.join(keys[:3])}{', …' * (len(keys) > 3)}.",
                "Give an adapter that was trained on this very base, and as peft saves it.",
                code="adapter",
            )
    if bool(lora.config.get("use_dora")) != any("magnitude" in own for own in fields.values()):
        raise AnchorsError(
            f"The adapter {lora.name!r} says use_dora = {lora.config.get('use_dora')}, but its tensors do not.",
            "Save it again with the peft that trained it.",
            code="adapter",
        )
    changes = {
        name: Change(
            own.get("whole"), (own["A"], own["B"]) if "A" in own else None, own.get("scale", 0.0), own.get("magnitude"),
            own.get("turned", False),
        )
        for name, own in fields.items()
    }  # fmt: skip
    if tied is not None and not {tied, HEAD} & changes.keys():
        tied = None
    entries = dict(base.entries)
    if tied is not None:
        entries[HEAD] = base.entries[tied]
    for name, change in changes.items():
        if change.whole is not None:
            entries[name] = lora.entries[change.whole]
    _require_fitting(lora, changes, shapes | {name: entry.shape for name, entry in entries.items()})
    beside = any(lora.folder.glob("tokenizer*"))
    return Adapted(
        lora.name, lora.folder if beside else base.folder, entries, base.config, lora.commit, base._files, notes,
        base=base, lora=lora, changes=changes, tied=tied,
    )  # fmt: skip


def _scale(lora: Checkpoint, module: str, shapes: Mapping[str, tuple[int, ...]], key: str) -> float:
    """s of a module; peft's patterns name the end of a module, the first that fits counts.

    Raises:
        AnchorsError: the rank is not the one that the factors have.
    """
    config = lora.config

    def of(pattern: str, default: Any) -> Any:
        own = config.get(pattern) or {}
        return next((value for end, value in own.items() if re.match(rf"(.*\.)?({end})$", module)), default)

    rank, alpha = of("rank_pattern", config.get("r")), of("alpha_pattern", config.get("lora_alpha"))
    shape = shapes[key]
    seen = None if len(shape) != 2 else shape[0 if key.removesuffix(".weight").endswith("A") else 1]
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or (seen is not None and seen != rank):
        raise AnchorsError(
            f"{key} in {lora.name!r} has rank {seen}, its configuration says r = {rank} and lora_alpha = {alpha}.",
            "Take the configuration that was saved with these tensors.",
            code="adapter",
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _require_fitting(
    lora: Checkpoint, changes: Mapping[str, Change], shapes: Mapping[str, Sequence[int]]
) -> None:
    for name, change in changes.items():
        if change.low is None:
            continue
        a, b = (lora.shapes[part] for part in change.low)
        made = b if len(b) == 1 else (b[0], a[1])
        made = made[::-1] if change.turned else made
        if tuple(made) != tuple(shapes[name]):
            raise AnchorsError(
                f"The adapter {lora.name!r} makes {'×'.join(map(str, made))} of {name}, which is "
                f"{'×'.join(map(str, shapes[name]))}.",
                "Give the model that it was trained on as --base.",
                code="adapter",
            )
