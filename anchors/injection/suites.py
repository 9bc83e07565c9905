"""What a sweep and the flow of merged models have in common: suites that belong together, and their models."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from anchors.errors import AnchorsError
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import VisionLanguageModel
from anchors.injection.merging.adapter import open_expert
from anchors.injection.merging.checkpoint import ADAPTER
from anchors.injection.merging.memory import TaskVectors, Weights
from anchors.model.language import LanguageModel, load
from anchors.study.cluster import Cluster, Gathered
from anchors.study.engine import Stretch, carry_out, silent, told
from anchors.study.plan import Outlook, foretold
from anchors.study.report import Found, Inquiry


@dataclass(frozen=True)
class SuiteModels:
    """A suite with its VLM; other models are loaded as they are needed.

    Attributes:
        suite: its models and examples.
        wanted: what is measured.
        vlm: not injected.
    """

    suite: Suite
    wanted: Any
    vlm: VisionLanguageModel

    @cached_property
    def base(self) -> LanguageModel:
        return self.language_model("base")

    def language_model(self, *named: str) -> LanguageModel:
        """A language model of the suite; its weights are never in half precision, merging is not either."""
        half = self.vlm.precision in ("bfloat16", "float16")
        precision = "tf32" if half else self.vlm.precision
        return load(self.suite.model(*named), device=str(self.vlm.device), precision=precision)

    def task_vectors(self, expert: LanguageModel, scenario: str) -> TaskVectors:
        """τ_v and τ_e, of the VLM's tower and of the expert of a scenario."""
        models, source = (self.vlm, self.base, expert), Path(self.suite.model("experts", scenario))
        own: list[Weights] = [model.model for model in models]
        if (source / ADAPTER).is_file():
            # In the model that answers peft's layers stand in the place of matrices.
            found = open_expert(source, self.suite.model("base"))
            own[2] = {name: found.weight(name) for name in found.apart.shapes}
        return TaskVectors.of(*own, tokenizers=tuple(model.tokenizer for model in models))


@dataclass(frozen=True)
class SuiteInquiry(Inquiry):
    """A study of suites.

    Attributes:
        suites: of one experiment; they differ in the seed of their training.
        wanted: what is measured.
        device, precision: as in `anchors.injection.load_vlm`.
    """

    suites: Sequence[Suite]
    wanted: Any
    device: str = "auto"
    precision: str = "auto"
    kind: ClassVar[str]

    @abstractmethod
    def stretches(self) -> Iterator[Stretch]:
        """The work."""

    def shares(self) -> Sequence["SuiteInquiry"]:
        """Smaller studies that come to the same rows: what machines of a cluster are given."""
        return [replace(self, suites=[suite]) for suite in self.suites]

    def gathered(self, cluster: Cluster) -> Gathered:
        """The same, measured by the machines of a cluster; suites must lie where all of them find them."""
        require_siblings(self.suites, lambda suite: suite.skills)
        cells = [partial(_share, share) for share in self.shares()]
        return Gathered(cluster, cells, partial(_whole, self), frozenset({self.kind}), notes=self.notes_on)

    def outlook(self, out: Path) -> list[Outlook]:
        """See `anchors.study.plan.foretold`."""
        return foretold(self.stretches(), out)


def _share(share: SuiteInquiry, out: Path) -> list[str]:
    """Measure it; gives what was found of earlier results."""
    return told(run for stretch in share.stretches() for run in carry_out([stretch], out)[1])


def _whole(inquiry: SuiteInquiry, out: Path) -> Found:
    return inquiry.measure(out, silent)


def require_siblings(suites: Sequence[Suite], scenarios: Callable[[Suite], object]) -> None:
    """Suites of one experiment are trainings of the same with different seeds.

    Args:
        suites: of it.
        scenarios: what of a suite is measured.

    Raises:
        AnchorsError: two of one seed, or with other scenarios.
    """
    seeds = [s.seed for s in suites]
    if doubles := sorted({s for s in seeds if seeds.count(s) > 1}):
        raise AnchorsError(
            f"Several suites have the seed {doubles[0]}.",
            "Suites of one experiment are trainings with different seeds.",
            code="mixed",
        )
    if len({(suite.vision, scenarios(suite)) for suite in suites}) > 1:
        raise AnchorsError(
            "The suites differ in their scenarios: they are not one experiment.",
            "Name common ones with --scenarios.",
            code="mixed",
        )


def gap(vectors: TaskVectors, side: Any) -> float:
    """‖side − base‖ over the tower without embedding and head."""
    names = [pair.vlm for pair in vectors.pairs if pair.kind not in ("embedding", "head")]
    own = {name: side[name] if name in side else vectors.apart.taken(side, name) for name in names}
    gaps = [torch.dist(own[name].float(), vectors.base[name].float()) for name in names]
    return float(torch.linalg.vector_norm(torch.stack(gaps)))
