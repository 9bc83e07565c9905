"""The settings of `anchors flow --prompts`: the flow into the last token of prompts that need no label words."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from anchors.errors import AnchorsError

if TYPE_CHECKING:
    from anchors.model.language import LanguageModel
    from anchors.study.texts import TextFlow
    from anchors.tasks.aims import Asked
    from anchors.tasks.task import Chat


@dataclass(frozen=True)
class TargetFlow:
    """Which tokens the model reads when it predicts a token, by layer, of any prompts.

        I_l = |Σ_h A ⊙ ∂L/∂A|    L = −log p(target), or log p(against) − log p(target)

    S_tq is the mean flow from the tokens before the target position into it, S_ww that of all other pairs.

    Attributes:
        prompts: a file of prompts without label words: .txt (one a line), or .jsonl, .csv, .tsv with the column `prompt`, and with
            `target` and `against` where rows have their own.
        target: the next token whose −log p is differentiated: a text, #1234 (an id), or top (the model's own next token).
        against: another token: what is differentiated is the log-odds of the target against it.
    """

    kind: ClassVar[str] = "flow_prompts"
    version: ClassVar[int] = 1
    fresh: ClassVar[bool] = True

    prompts: Path | None = None
    target: str | None = None
    against: str | None = None

    def asked(self) -> "tuple[Asked, ...]":
        """The rows of the file.

        Raises:
            AnchorsError: no file, one that cannot be read, a prompt without a target.
        """
        from anchors.tasks.aims import Asked
        from anchors.tasks.files import named

        if self.prompts is None:
            raise AnchorsError(
                "--target and --against are for prompts without label words, and no file of them is named.",
                "Add --prompts FILE; of a single prompt `anchors view PROMPT --target TOKEN` makes a page.",
                code="options-together",
            )
        found = []
        for place, row in named(self.prompts, ("prompt", "target", "against")):
            target = row.get("target", self.target)
            if target is None:
                raise AnchorsError(
                    f"{place} of {self.prompts.name} has no target.",
                    "Give it a column `target`, or all rows one with --target, such as --target top.",
                    code="target",
                )
            found.append(Asked(row["prompt"], target, row.get("against", self.against), place))
        return tuple(found)

    def on(
        self,
        model: "LanguageModel",
        *,
        chat: "Chat | None" = None,
        batch_size: int | None = None,
        skip_too_long: bool = False,
    ) -> "TextFlow":
        """The study of a model.

        Args:
            model: that is asked.
            chat: prompts are what the user says, through the model's own chat template.
            batch_size, skip_too_long: see `anchors.study.runner.Sample`.

        Raises:
            AnchorsError: see `asked`.
        """
        from anchors.study.texts import TextFlow, Texts

        asked, file = self.asked(), self.prompts
        texts = Texts(Path(file or "").stem, asked, str(file), chat, batch_size, skip_too_long)
        return TextFlow(model, self, texts)
