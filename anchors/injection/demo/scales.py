"""The sizes of the demonstration: `tiny` for minutes on one core (`tiny-patches` with pictures of 16 patches, not of 4), `135m`
for minutes on one GPU, `135m-digits` for an hour on one core. Every count is here."""

import math
from dataclasses import dataclass, field, replace

from anchors._names import forwarding
from anchors.errors import AnchorsError


@dataclass(frozen=True)
class Stage:
    """One training.

    Attributes:
        steps: of the optimizer.
        lr: highest learning rate, of the projector or the vision tower where there is one.
        items: question and answer pairs (vision: pictures) in a step.
        lm_lr: highest learning rate of the language tower where the stage trains both; 0 leaves it as it is.
    """

    steps: int
    lr: float
    items: int
    lm_lr: float = 0.0


@dataclass(frozen=True)
class TowerSize:
    """A transformer's size."""

    layers: int
    width: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Scale:
    """Everything that the models and data of a demonstration depend on, besides the seed.

    Attributes:
        name: also the world's.
        image: width of a picture in pixels.
        patch: width of a patch; every patch is one token.
        vision: the vision tower.
        language: the language tower; None for a given one.
        base: its training on texts; of a given one, further training.
        classify: of the vision tower, by itself.
        project: of the projector alone.
        gentle: of projector and language tower together.
        experts: by skill, on texts.
        upper: of the VLM on a skill's questions about pictures.
        copies: moved copies of every digit to train on.
        drawings: pictures of objects, held-out ones included.
        held_out: pictures of each kind (digits, objects) by split.
        rows: prompts of each number of demonstrations, from which steps draw.
        shots: numbers of demonstrations in a prompt of training.
        replay: share of plain questions, on texts, among an expert's: experts keep what their base could.
        vision_replay: share of plain questions, on pictures, among those of the upper bound.
        warmup: share of a stage's steps.
        clip: longest gradient.
    """

    name: str
    image: int
    patch: int
    vision: TowerSize
    language: TowerSize | None
    base: Stage
    classify: Stage
    project: Stage
    gentle: Stage
    experts: dict[str, Stage]
    upper: Stage
    copies: int = 1
    drawings: int = 0
    held_out: dict[str, int] = field(default_factory=lambda: {"test": 300, "tune": 100, "demonstration": 100})
    rows: int = 2000
    shots: tuple[int, ...] = (0, 4)
    replay: float = 0.6
    vision_replay: float = 0.25
    warmup: float = 0.05
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return (self.image // self.patch) ** 2

    def with_steps(self, factor: float) -> "Scale":
        """All trainings longer or shorter; none vanishes."""
        if not 0 < factor < math.inf:
            raise AnchorsError(
                f"--steps-factor is {factor}; it must be above 0 and finite.",
                "For example: 0.1 for a trial.",
                code="option-value",
            )

        def longer(stage: Stage) -> Stage:
            return replace(stage, steps=max(1, round(stage.steps * factor)))

        names = ("base", "classify", "project", "gentle", "upper")
        changed = {name: longer(getattr(self, name)) for name in names}
        experts = {skill: longer(stage) for skill, stage in self.experts.items()}
        return replace(self, experts=experts, **changed)


TINY = Scale(
    name="tiny",
    image=16,
    patch=8,
    vision=TowerSize(layers=2, width=64, heads=4, hidden=128),
    language=TowerSize(layers=4, width=96, heads=4, hidden=256),
    base=Stage(steps=600, lr=2e-3, items=120),
    classify=Stage(steps=400, lr=2e-3, items=64),
    project=Stage(steps=300, lr=2e-3, items=120),
    gentle=Stage(steps=150, lr=5e-4, items=120, lm_lr=3e-5),
    experts={
        "instruction": Stage(steps=250, lr=2.5e-4, items=120),
        "crosslingual": Stage(steps=300, lr=3e-4, items=120),
        "mathematics": Stage(steps=400, lr=3e-4, items=120),
    },
    upper=Stage(steps=200, lr=5e-4, items=120, lm_lr=5e-4),
)

PATCHES = replace(TINY, name="tiny-patches", patch=4)

LARGE = Scale(
    name="135m",
    image=64,
    patch=16,
    vision=TowerSize(layers=6, width=256, heads=8, hidden=1024),
    language=None,
    base=Stage(steps=150, lr=3e-5, items=160),
    classify=Stage(steps=1500, lr=1e-3, items=256),
    project=Stage(steps=800, lr=1e-3, items=160),
    gentle=Stage(steps=500, lr=2e-4, items=160, lm_lr=2e-5),
    experts=dict.fromkeys(
        ("instruction", "crosslingual", "mathematics"), Stage(steps=250, lr=3e-5, items=160)
    ),
    upper=Stage(steps=250, lr=1e-4, items=160, lm_lr=3e-5),
    copies=8,
    drawings=14000,
    held_out={"test": 150, "tune": 50, "demonstration": 100},
    rows=4000,
)

DIGITS = replace(
    LARGE,
    name="135m-digits",
    vision=TowerSize(layers=3, width=128, heads=4, hidden=512),
    base=Stage(steps=50, lr=3e-5, items=24),
    classify=Stage(steps=400, lr=1e-3, items=64),
    project=Stage(steps=300, lr=2e-3, items=16),
    gentle=Stage(steps=80, lr=3e-4, items=16, lm_lr=2e-5),
    experts=dict.fromkeys(("instruction", "crosslingual", "mathematics"), Stage(steps=60, lr=5e-5, items=24)),
    upper=Stage(steps=60, lr=3e-4, items=16, lm_lr=5e-5),
    drawings=0,
    held_out={"test": 100, "tune": 20, "demonstration": 20},
    rows=1500,
    shots=(0,),
)

SCALES = {scale.name: scale for scale in (TINY, PATCHES, DIGITS, LARGE)}


__getattr__ = forwarding(__name__)
