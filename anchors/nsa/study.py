"""The settings of `anchors nsa probe`. Nothing here imports torch before it is needed."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel
    from anchors.nsa.probing.report import Probing

OTHER = "The same weights, other blocks"


@dataclass(frozen=True)
class NSAProbe:
    """By branch, layer and group, on held-out episodes.

    Flow by branch; how often the last position selects label words' blocks, against chance and near-by blocks; purity,
    recall, dilution; gates; and what banning, forcing, cutting and isolating them does to the answer. Running the same
    command again computes only what is missing.

    Attributes:
        prompts: held-out episodes.
        seed: of the episodes.
        tokens: length of an episode; default: as trained.
        demonstrations: at most so many before the query; default: as many as fit.
        classes: classes of an episode, e.g. 4-8; default: as trained.
        words: words of a text, e.g. 16-24: longer ones leave blocks without a label word; default: as trained.
        keyword_rate: share of a text's words that are its class's; default: as trained.
        interventions: ban, force, cut and isolate, too.
        vectors: label words of a prompt for the identity probe.
        d: another stride.
        lp: other selection blocks, l'.
        n: another number of blocks.
        w: another window.
    """

    kind: ClassVar[str] = "nsa_probe"

    prompts: int = field(default=16, metadata={"min": 1, "option": ("--prompts", "-n")})
    seed: int = field(default=0, metadata={"min": 0})
    tokens: int | None = field(default=None, metadata={"min": 1})
    demonstrations: int | None = field(default=None, metadata={"min": 1})
    classes: tuple[int, int] | None = None
    words: tuple[int, int] | None = None
    keyword_rate: float | None = None
    interventions: bool = True
    vectors: int = field(default=32, metadata={"min": 0})
    d: int | None = field(default=None, metadata={"min": 1, "rich_help_panel": OTHER})
    lp: int | None = field(default=None, metadata={"min": 1, "rich_help_panel": OTHER})
    n: int | None = field(default=None, metadata={"min": 1, "option": "--n", "rich_help_panel": OTHER})
    w: int | None = field(default=None, metadata={"min": 1, "rich_help_panel": OTHER})

    def on(self, model: "LanguageModel", folder: Path, name: str | None = None) -> "Probing":
        """The probe of a model.

        Args:
            model: loaded from `folder`.
            folder: of its training.
            name: what the model is called in results.

        Raises:
            AnchorsError: another kind of model, sizes that do not fit together.
        """
        from anchors.nsa.probing.probe import EpisodeProbe, geometry_of, with_geometry
        from anchors.nsa.probing.report import Probing, episodes_of

        model = model if name is None else replace(model, name=name)
        geometry_of(model)
        model = with_geometry(model, d=self.d, lp=self.lp, n=self.n, w=self.w)
        episodes = episodes_of(
            model,
            folder,
            tokens=self.tokens,
            classes=self.classes,
            words=self.words,
            keyword_rate=self.keyword_rate,
        )
        return Probing(
            model,
            EpisodeProbe(
                episodes, self.seed, self.prompts, self.demonstrations, self.interventions, self.vectors
            ),
        )
