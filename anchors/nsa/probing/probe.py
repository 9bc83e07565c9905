"""Do label words stay anchors when attention is natively sparse? Every measure of it on held-out episodes, resumable.

For each prompt one forward and backward pass reads choices, gates, patterns and the flow of every branch; then every
intervention is run. What the rows come to is in `anchors.nsa.probing.tables`.
"""

import copy
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from anchors.attention.seam import seam
from anchors.errors import AnchorsError, CertificateError, demand_seed
from anchors.flow.saliency import TOLERANCE, collate, target_loss
from anchors.model.identity import software
from anchors.model.language import LanguageModel, load
from anchors.model.source import Source
from anchors.nsa.config import NSAConfig
from anchors.nsa.geometry import Geometry
from anchors.nsa.model import NativeSparseAttention
from anchors.nsa.probing import metrics
from anchors.nsa.probing.interventions import effects
from anchors.nsa.probing.taps import WHICH, BranchTap, Look, Measure, Places
from anchors.nsa.training.episodes import Episodes
from anchors.nsa.training.vocabulary import SPECIALS, Vocabulary
from anchors.study.engine import Lot, Progress, Stretch, Unit, carry_out, demand_same, watched
from anchors.study.helpers import helpers
from anchors.study.results import Run, set_aside, write_atomic
from anchors.study.runner import unknown_code
from anchors.tasks.prompts import Prompt

KIND = "nsa_probe"
VERSION = 1
COLUMNS = ["seed", "number", "condition", "layer", "group", "head", "place", "metric", "value"]


@dataclass(frozen=True)
class EpisodeProbe:
    """What is probed.

    Attributes:
        episodes: what the prompts are like; those of the stream that no training sees.
        seed: of the episodes.
        prompts: how many.
        demonstrations: at most so many before the query; None for as many as fit.
        interventions: run them, too (most of the time goes there).
        vectors: at most so many label words of a prompt are kept for the identity probe.
    """

    episodes: Episodes
    seed: int = 0
    prompts: int = 16
    demonstrations: int | None = None
    interventions: bool = True
    vectors: int = 32

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("seed", 0), ("vectors", 0), ("demonstrations", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise AnchorsError(
                    f"{name} is {value}.", f"It must be at least {least}.", code="option-value"
                )
        demand_seed(self.seed)

    def prompt(self, number: int) -> Prompt:
        """Prompt `number`: its query's label can be known from the demonstrations.

        Raises:
            AnchorsError: the episode holds none such.
        """
        episode = self.episodes.episode(self.seed, number)
        most = (
            episode.length - 1
            if self.demonstrations is None
            else min(self.demonstrations, episode.length - 1)
        )
        knowable = [k for k in range(1, most + 1) if episode.knowable[k]]
        if not knowable:
            raise AnchorsError(
                f"Episode {number} of seed {self.seed} has no query whose label can be known from {most} demonstrations.",
                "Have more demonstrations, fewer classes or a higher keyword rate.",
                code="too-few",
            )
        return episode.prompt(knowable[-1])


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        rows: columns seed, number, condition, layer, group, head, place, metric, value; one per measured value.
        vectors: by layer and kind, what stood for label words; with `token` (which label word) and `number` (prompt).
        config: what the rows depend on.
        notes: what a reader must know.
    """

    rows: pd.DataFrame
    vectors: pd.DataFrame
    config: dict[str, Any]
    notes: list[str]


def geometry_of(model: LanguageModel) -> Geometry | None:
    """The blocks of an NSA model; None for its twin with full attention.

    Raises:
        AnchorsError: another kind of model.
    """
    config = model.model.config
    if not isinstance(config, NSAConfig):
        raise AnchorsError(
            f"{model.name} is a {type(model.model).__name__}, not a model with Native Sparse Attention.",
            "Train one with `anchors nsa train`.",
            code="model-kind",
        )
    return config.geometry if config.attention == "nsa" else None


def with_geometry(model: LanguageModel, **sizes: int | None) -> LanguageModel:
    """The same weights reading other blocks: what selection and window lose or gain without another training.

    Args:
        model: an NSA model.
        sizes: new values of d, lp, n and w; None for those that stay. l cannot change: φ has weights for l positions.

    Raises:
        AnchorsError: full attention, or sizes that do not fit together.
    """
    changed = {name: value for name, value in sizes.items() if value is not None}
    if not changed:
        return model
    if geometry_of(model) is None:
        raise AnchorsError(
            f"{model.name} has full attention: there is no block to change.",
            "Leave it out.",
            code="model-kind",
        )
    twin = copy.deepcopy(model.model)
    for name, value in changed.items():
        setattr(twin.config, name, value)
    for module in twin.modules():
        if isinstance(module, NativeSparseAttention):
            module.geometry = twin.config.geometry
    routed = load(twin, tokenizer=model.tokenizer, device=str(model.device), precision=model.precision)
    name = ", ".join(f"{name}={value}" for name, value in changed.items())
    return replace(routed, name=f"{model.name} at {name}", revision=model.revision)


def vocabulary_of(model: LanguageModel) -> Vocabulary:
    """The words of the episodes a model was trained on, from its tokenizer.

    Raises:
        AnchorsError: the tokenizer is not one of `Vocabulary`.
    """
    tokens = model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    labels = sum(token[:1].isupper() for token in tokens[len(SPECIALS) :])
    words = len(tokens) - len(SPECIALS) - labels
    try:
        found = Vocabulary(labels, words)
    except AnchorsError:
        found = None
    if found is None or list(found.tokens) != list(tokens):
        raise AnchorsError(
            f"The tokenizer of {model.name} is not one of the episodes: their label words are not in it.",
            "Probe a model that `anchors nsa train` trained on episodes.",
            code="tokenizer",
        )
    return found


def demand_choice(probe: EpisodeProbe, geometry: Geometry | None) -> None:
    """Refuse prompts that are selected whole.

    Raises:
        AnchorsError: every block of the prompts is selected anyway.
    """
    longest = probe.episodes.tokens
    if probe.demonstrations is not None:
        longest = min(longest, max(len(probe.prompt(number).ids) for number in range(min(probe.prompts, 8))))
    if geometry is not None and geometry.fully_selected(longest):
        raise AnchorsError(
            f"Prompts of up to {longest} tokens have {geometry.blocks(longest)} blocks of {geometry.lp}, and n = "
            f"{geometry.n} are selected: everything is, whatever is in it.",
            f"Use --tokens above {geometry.n * geometry.lp}, or a model with smaller blocks.",
            code="too-few",
        )


def probe_prompt(
    model: LanguageModel, prompt: Prompt, geometry: Geometry | None, rng: np.random.Generator, *,
    interventions: bool = True, vectors: int = 32,
) -> tuple[list[Measure], Look, Places]:  # fmt: skip
    """Everything of one prompt.

    Raises:
        CertificateError: the saliency does not satisfy Σ_j A_ij ∂L/∂A_ij = ⟨z_i, ∂L/∂z_i⟩.
        AnchorsError: a loss that is not a number.
    """
    layers = frozenset(range(model.n_layers))
    places = Places.of(prompt, rng)
    look = Look(layers, places, vectors)
    tap = BranchTap(layers, places, look)
    batch = collate([prompt], model.device)
    with torch.enable_grad(), seam(model.modules, taps=[tap], probes=[look]), model.arithmetic():
        loss, probabilities = target_loss(model.logits_at(batch.ids, batch.target), batch)
        loss.sum().backward()
    error = tap.certificate()
    if not error <= TOLERANCE[model.precision]:
        raise CertificateError(
            f"In {model.name} Σ_j A_ij ∂L/∂A_ij differs from ⟨z_i, ∂L/∂z_i⟩ by {error:.1e} of its size.",
            f"Allowed at {model.precision}: {TOLERANCE[model.precision]:.0e}. Try --precision float32.",
        )
    found = [*look.found, *tap.results(), *_facts(prompt, places, geometry)]
    found += [
        Measure("loss", float(loss.detach())),
        Measure("classes", len(prompt.label_ids)),
        Measure("identity_error", error),
    ]
    if interventions:
        found += effects(model, prompt, places, geometry, look.chosen)
    else:
        right = float(probabilities[0].argmax() == prompt.gold)
        found.append(Measure("accuracy", right))
    return found, look, places


def _facts(prompt: Prompt, places: Places, geometry: Geometry | None) -> list[Measure]:
    """Length, number of label words, and how many of them each candidate block holds."""
    tokens = len(prompt.ids)
    found = [Measure("tokens", tokens), Measure("demonstrations", len(prompt.label_positions))]
    if geometry is None:
        return found
    candidate = metrics.candidates(places.target, tokens, geometry)
    found += [Measure("chance", metrics.chance(places.target, geometry))]
    for which in WHICH:
        weight = places.weights(which, geometry.lp, len(candidate))
        found += [
            Measure("label_words", int(weight[j]), which, place=int(j)) for j in np.flatnonzero(candidate)
        ]
    return found


def stretch(
    model: LanguageModel, probe: EpisodeProbe, told: list[str], certify: Callable[[], object] = lambda: None
) -> Stretch:
    """The work of a probe.

    Args:
        model, probe: as in `measure`.
        told: gets notes on vectors that are gone.
        certify: see `Stretch`.

    Raises:
        AnchorsError: another kind of model, prompts that are selected whole or too long.
    """
    geometry = geometry_of(model)
    demand_choice(probe, geometry)
    if model.context is not None and probe.episodes.tokens > model.context:
        raise AnchorsError(
            f"Episodes of {probe.episodes.tokens} tokens exceed the model's {model.context} positions.",
            f"Use --tokens {model.context} or fewer.",
            code="length",
        )
    config = {
        "kind": KIND, "version": VERSION, "model": dict(model.identity.parts), "software": software(), "precision": model.precision,
        "episodes": probe.episodes.facts(), "demonstrations": probe.demonstrations,
        "interventions": probe.interventions, "vectors": probe.vectors,
    }  # fmt: skip
    wanted = [(probe.seed, number) for number in range(probe.prompts)]

    def lots(run: Run) -> list[Lot]:
        again = set()
        for unit in run.done().intersection(wanted):
            path = _vectors(run.folder, unit)
            if not _whole(path):
                again.add(unit)
                what = f"{set_aside(path)} was cut or changed" if path.exists() else f"{str(path)!r} is gone"
                told.append(f"{what}; its prompt is probed anew.")

        def one(_: None, units: Sequence[Unit]) -> pd.DataFrame:
            ((seed, number),) = units
            prompt = probe.prompt(number)
            found, look, places = probe_prompt(
                model, prompt, geometry, np.random.default_rng([seed, number, 7]),
                interventions=probe.interventions, vectors=probe.vectors,
            )  # fmt: skip
            _write_vectors(_vectors(run.folder, (seed, number)), look, places, prompt)
            return _frame(seed, number, found)

        return [Lot(wanted, lambda: None, one, too_large, again=again)]

    def too_large(unit: Unit | None) -> AnchorsError:
        tokens = len(probe.prompt(cast(Unit, unit)[1]).ids)  # nothing is shared
        return AnchorsError(
            f"A prompt of {tokens} tokens does not fit into memory: its patterns are formed whole.",
            "Use fewer --tokens or another --device.",
            code="memory",
        )

    anew = None
    if (crew := helpers()) and crew.source:
        anew = partial(_lots_of, crew.source, geometry, probe)
    return Stretch(config, wanted, lots, model.name, certify=certify, task="episodes", anew=anew)


def _lots_of(
    source: Source, geometry: Geometry | None, probe: EpisodeProbe, run: Run, device: str
) -> Sequence[Lot]:
    """The lots of a probe, in another process."""
    model = source.on(device).load()
    if geometry is not None and geometry != geometry_of(model):
        model = with_geometry(model, d=geometry.d, lp=geometry.lp, n=geometry.n, w=geometry.w)
    own = stretch(model, probe, [])
    demand_same(run, own.config)
    return own.lots(run)


def measure(
    model: LanguageModel,
    probe: EpisodeProbe,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    certify: Callable[[], object] = lambda: None,
) -> Probed:
    """Probe a model, computing only the prompts that `out` does not hold.

    Args:
        model: NSA, or its twin with full attention.
        probe: what is probed.
        out: results folder; finished prompts are kept under its `runs`. None takes a new temporary folder.
        progress: called with (prompts done, prompts in all); None shows a bar on a terminal or in a notebook.
        certify: asked before the first prompt, see `anchors.study.engine.Stretch`.

    Raises:
        AnchorsError: another kind of model, prompts that are selected whole or too long, no memory.

    Example:
        >>> model = load("experiments/nsa/checkpoint")
        >>> found = measure(model, EpisodeProbe(Episodes(tokens=1024, vocabulary=vocabulary_of(model)), prompts=16))
        >>> probe_tables(found.rows)["selection"]
    """
    told: list[str] = []
    work = stretch(model, probe, told, certify)
    with watched("nsa-probe", progress) as shown:
        rows, (run,) = carry_out([work], out or Path(tempfile.mkdtemp(prefix="anchors-")), shown)
    rows = rows.sort_values(["seed", "number"], kind="stable", ignore_index=True)
    notes = [*unknown_code(model.identity), *run.notes, *told, *notes_on(rows, geometry_of(model))]
    return Probed(rows, _read_vectors(run.folder, work.units), work.config, notes)


def _frame(seed: int, number: int, found: list[Measure]) -> pd.DataFrame:
    table = pd.DataFrame(
        [
            (seed, number, m.condition, m.layer, m.group, m.head, m.place, m.metric, float(m.value))
            for m in found
        ],
        columns=COLUMNS,
    )
    return table.astype(dict.fromkeys(("layer", "group", "head", "place"), "Int32"))


def _vectors(folder: Path, unit: tuple[int, int]) -> Path:
    return folder / f"vectors-{unit[0]}-{unit[1]}.npz"


def _whole(path: Path) -> bool:
    """Whether a file of vectors is there as it was written: a zip archive knows the checksums of its parts."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error):
        return False


def _write_vectors(path: Path, look: Look, places: Places, prompt: Prompt) -> None:
    arrays = {
        f"{layer}/{kind}": x.astype(np.float32)
        for layer, own in look.vectors.items()
        for kind, x in own.items()
    }
    tokens = np.array([prompt.ids[p] for p in places.labels[look.read]], dtype=np.int64)
    write_atomic(path, lambda draft: np.savez(draft, token=tokens, **arrays))  # ty: ignore[invalid-argument-type] - all are arrays


def _read_vectors(folder: Path, units: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    """Columns number, token, layer, kind, vector: one row per prompt, label word, layer and kind."""
    rows: list[tuple] = []
    for seed, number in units:
        with np.load(_vectors(folder, (seed, number)), allow_pickle=False) as found:
            for name in found.files:
                if name != "token":
                    layer, kind = name.split("/")
                    rows += [
                        (number, int(token), int(layer), kind, vector)
                        for token, vector in zip(found["token"], found[name], strict=True)
                    ]
    return pd.DataFrame(rows, columns=["number", "token", "layer", "kind", "vector"])


def notes_on(rows: pd.DataFrame, geometry: Geometry | None) -> list[str]:
    """What a reader must know before believing the numbers."""
    if geometry is None:
        return [
            "This model has full attention: it has no branches, blocks or gates; only flow and isolation are there."
        ]
    notes = []
    held = rows[(rows["metric"] == "label_words") & (rows["condition"] == "label")]
    if len(held) and (share := float((held["value"] > 0).mean())) > 0.9:
        notes.append(
            f"{share:.0%} of the blocks that can be chosen hold a label word: whether label words are selected above chance "
            "can hardly be seen at this block size. Read the rows of the right class (answer) instead."
        )
    if rows.loc[rows["metric"] == "wp_rate", "value"].empty:
        notes.append(
            f"The text of a demonstration lies within the {geometry.n_local} local blocks, which are always selected: how "
            "label words choose their text (wp_rate) cannot be measured; see wp_mass."
        )
    return notes
