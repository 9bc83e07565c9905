"""The settings of `anchors inject sweep` and `anchors inject flow`. Nothing here imports torch before it is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from anchors.injection.asking.suite import Suite
    from anchors.injection.image_flow.write import Flowing
    from anchors.injection.sweeping.report import Sweeping

SOME: dict[str, Any] = {"min": 1}


@dataclass(frozen=True)
class InjectSweep:
    """Method × strength × density × mask × layers on the scenarios of a suite: skill gained, vision kept, by intervals.

    Beside every setting stand the same questions on blank and on shuffled images; beside all of them the VLM alone, the
    expert told in words, the cascade and a fine-tuned VLM. Running the same command again computes only what is
    missing.

    Attributes:
        grid: small (some twenty settings) or full (some two hundred).
        methods: with commas, options behind colons: task-arithmetic:vlm_strength=0.8,ties,dare:rescale=none.
        strengths: the expert's λ, such as 0.25,0.5,1.
        densities: of methods that drop entries, such as 0.2,0.5.
        draws: masks of each random method.
        layers: ranges that are injected, such as 0-3,4-7,all, or thirds; default: all, and in a full grid each third of
            task arithmetic's.
        embeddings: keep, shared-rows, by-token; with commas.
        scenarios: with commas; default: all that have an expert.
        split: where results are reported; settings are chosen on `tune`, where the scenario and vision both have it.
        limit: at most so many examples of each split.
        controls: blank and shuffled images at every setting.
        batch: prompts at once; default: by length.
        retention: the share of the VLM's vision that a setting must keep on the examples it is chosen on (`tune`, see
            --split); whether it does so where results are reported is said. Changing it computes nothing anew.
    """

    kind: ClassVar[str] = "inject-sweep"

    grid: str = "full"
    methods: tuple[str, ...] | None = None
    strengths: tuple[float, ...] | None = None
    densities: tuple[float, ...] | None = None
    draws: int | None = field(default=None, metadata=SOME)
    layers: tuple[str, ...] | None = None
    embeddings: tuple[str, ...] = ("keep",)
    scenarios: tuple[str, ...] | None = None
    split: str = "test"
    limit: int | None = field(default=None, metadata=SOME)
    controls: bool = True
    batch: int | None = field(default=None, metadata=SOME)
    retention: float = field(default=0.95, metadata={"min": 0, "max": 1})

    def on(self, suites: "Sequence[Suite]", device: str = "auto", precision: str = "auto") -> "Sweeping":
        """The sweep of suites; see `anchors.injection.sweeping.sweep.sweep`."""
        from anchors.injection.sweeping.grid import Grid
        from anchors.injection.sweeping.report import Sweeping
        from anchors.injection.sweeping.sweep import Sweep

        grid = Grid(
            self.grid, self.methods, self.strengths, self.densities, self.draws, self.layers, self.embeddings
        )
        wanted = Sweep(
            grid, self.scenarios, self.split, self.limit, self.controls, self.batch, self.retention
        )
        return Sweeping(suites, wanted, device, precision)


@dataclass(frozen=True)
class InjectFlow:
    """Image tokens, text, label words and target are the roles of a prompt with demonstrations.

    Written are the flow by layer before and after, and over λ; whether vision damage goes with lost image flow; and whether
    a λ that is chosen as the largest that leaves the image flow as it was, within an ε, comes near the best. That choice
    uses no labels of its expert; ε, like the factor c of the norm-ratio rule, is fitted with labels of the other experts.
    Running the same command again computes only what is missing.

    Attributes:
        method: how experts are injected.
        strengths: values of λ_e, with commas; 0 is always there.
        density: of methods that drop entries.
        experts: names with commas; default: all.
        scenarios: names with commas; default: all. An expert is measured on its own and on vision.
        shots: demonstrations before the query.
        prompts: of each scenario.
        examples: of each scenario for the accuracy.
        seed: of the demonstrations.
    """

    kind: ClassVar[str] = "inject-flow"

    method: str = "task-arithmetic"
    strengths: tuple[float, ...] = (0.0, 0.25, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5)
    density: float | None = field(default=None, metadata={"min": 0, "max": 1})
    experts: tuple[str, ...] | None = None
    scenarios: tuple[str, ...] | None = None
    shots: int = field(default=2, metadata={"min": 0})
    prompts: int = field(default=100, metadata={"min": 1, "option": ("--prompts", "-n")})
    examples: int = field(default=300, metadata=SOME)
    seed: int = field(default=0, metadata={"min": 0})

    def on(self, suites: "Sequence[Suite]", device: str = "auto", precision: str = "auto") -> "Flowing":
        """The flow of suites; see `anchors.injection.image_flow.report.measure`."""
        from anchors.injection.image_flow.report import Wanted
        from anchors.injection.image_flow.write import Flowing
        from anchors.injection.merging.recipe import Recipe

        wanted = Wanted(
            Recipe(method=self.method, density=self.density), self.strengths, self.shots, self.prompts, self.examples,
            _named(self.scenarios), _named(self.experts), self.seed,
        )  # fmt: skip
        return Flowing(suites, wanted, device, precision)


def _named(words: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """`all` is what was written for all of them in 0.4.0."""
    return None if words == ("all",) else words
