"""What a task is: a template, its label words and which of their tokens count."""

import json
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anchors.errors import AnchorsError, nearest
from anchors.places import file_name
from anchors.tasks.files import decode

Policy = Literal["first", "last", "all"]
"""Which tokens of a label word are its label-word positions p_k, when it has several."""

POLICIES: tuple[Policy, ...] = ("first", "last", "all")

Control = Literal["none", "random-positions", "permuted-labels", "order-only"]
"""What a prompt may show instead, see `anchors.tasks.drawing.Draw`."""

CONTROLS: tuple[Control, ...] = ("none", "random-positions", "permuted-labels", "order-only")


@dataclass(frozen=True)
class Hub:
    """Where the data of a task lives on the hub, pinned.

    Repositories that hold a loading script are read from the hub's own parquet conversion of them: scripts are code.
    """

    path: str
    name: str | None
    train: str
    test: str
    text: str
    label: str
    revision: str


ChatForm = Literal["turns", "one"]
"""How demonstrations stand in a conversation: a turn each and the label word as its answer, or all in one turn."""

CHAT_FORMS: tuple[ChatForm, ...] = ("turns", "one")


@dataclass(frozen=True)
class Chat:
    """Prompts through the model's own chat template.

    Attributes:
        form: `turns`: each demonstration is the user's turn, its label word the assistant's answer; `one`: demonstrations and
            query are one turn of the user, written as without a chat.
        system: what the system says first, or None: what the template says by itself, if anything.
    """

    form: ChatForm = "turns"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.form not in CHAT_FORMS:
            raise AnchorsError(
                f"Unknown form of chat {self.form!r}.", nearest(self.form, CHAT_FORMS), code="unknown-name"
            )
        if self.system is not None and (not self.system or self.system != self.system.strip()):
            raise AnchorsError(
                f"The system's text {self.system!r} is empty, or begins or ends with white space.",
                "Templates cut white space off; leave it out.",
                code="option-value",
            )


@dataclass(frozen=True)
class Task:
    """A classification task written as text.

    Attributes:
        name: short name.
        template: with `{text}` and `{label}`, for example `Review: {text}\\nSentiment:{label}`. It stands as written;
            white space right before `{label}` belongs to the label word. The one convention: where `{label}` follows
            a colon, a space is put between them (`Sentiment: Positive`), as the paper's templates mean it.
        labels: the label words, in the order of the class numbers, without their leading space.
        policy: which tokens of a label word of several tokens are its positions. The prediction is always read
            at the first token, the only one that can follow the target position.
        separator: between demonstrations.
        hub: pinned source for `--data hub`, or None.
        colon_space: False for `Sentiment:Positive`. Label words in a script without spaces (full-width ones, as Chinese
            and Japanese) have none anyway.
        chat: through the model's own chat template, or None: as plain text.
    """

    name: str
    template: str
    labels: tuple[str, ...]
    policy: Policy = "first"
    separator: str = "\n"
    hub: Hub | None = None
    colon_space: bool = True
    chat: Chat | None = None

    def __post_init__(self) -> None:
        for key in ("name", "template", "policy", "separator"):
            if not isinstance(value := getattr(self, key), str):
                raise AnchorsError(
                    f"The {key} of a task is {value!r}, not a string.",
                    "Write it in quotation marks.",
                    code="task",
                )
        if not isinstance(self.labels, tuple):
            raise AnchorsError(
                f"The label words of task {self.name!r} are {self.labels!r}, not a tuple of strings.",
                'For example: ("Negative", "Positive").',
                code="label-words",
            )
        if strangers := [label for label in self.labels if not isinstance(label, str)]:
            raise AnchorsError(
                f"The label word {strangers[0]!r} of task {self.name!r} is not a string.",
                "Write it in quotation marks.",
                code="label-words",
            )
        if not isinstance(self.colon_space, bool):
            raise AnchorsError(f"colon_space = {self.colon_space!r}: it is true or false.", code="task")
        file_name(self.name, "the task")
        for placeholder in ("{text}", "{label}"):
            count = self.template.count(placeholder)
            if count != 1:
                raise AnchorsError(
                    f"The template {self.template!r} holds {placeholder} {count} times.",
                    "It must hold {text} and {label} once each, as in 'Review: {text}\\nSentiment:{label}'.",
                    code="task",
                )
        if self.template.index("{label}") < self.template.index("{text}"):
            raise AnchorsError(
                f"In the template {self.template!r} the label comes before the text.",
                "The label must come last: the model predicts it from what stands before.",
                code="task",
            )
        if len(self.labels) < 2:
            raise AnchorsError(
                f"Task {self.name!r} has {len(self.labels)} label word(s).",
                "Give two at least.",
                code="label-words",
            )
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice or not all(label.strip() for label in self.labels):
            raise AnchorsError(
                f"Label words must be different and not empty; got {list(self.labels)}.",
                "Rename one.",
                code="label-words",
            )
        if padded := [label for label in self.labels if label != label.strip()]:
            raise AnchorsError(
                f"The label word {padded[0]!r} begins or ends with white space.",
                "White space belongs into the template, right before or after {label}.",
                code="label-words",
            )
        if self.policy not in POLICIES:
            raise AnchorsError(
                f"Unknown label-word policy {self.policy!r}.",
                nearest(self.policy, POLICIES),
                code="unknown-name",
            )

    @property
    def prefix(self) -> str:
        """What stands between the text and the label word: `\\nSentiment:`."""
        return self.template.split("{text}")[1].split("{label}")[0].rstrip(" \t")

    @property
    def space(self) -> str:
        """The white space that a label word carries in front: what the template says, or a space after a colon."""
        between = self.template.split("{text}")[1].split("{label}")[0]
        if between.endswith(":") and self.colon_space and not all(map(without_spaces, self.labels)):
            return " "
        return between[len(between.rstrip(" \t")) :]

    @property
    def pieces(self) -> tuple[str, str, str]:
        """What stands before the text, between text and label word, and after the label word."""
        return self.template.split("{text}")[0], self.prefix, self.template.split("{label}")[1]

    @property
    def called(self) -> str:
        """Its name in rows, tables and figures, which tell a chat from a plain prompt: `sst2 (chat)`."""
        if self.chat is None:
            return self.name
        said = (
            ["chat"] + ["one turn"] * (self.chat.form == "one") + ["system"] * (self.chat.system is not None)
        )
        return f"{self.name} ({', '.join(said)})"

    def identity(self) -> dict:
        """What makes results of this task comparable: template, labels, policy and separator; the chat, if it is one.

        Where 0.4.0 put a space before the label word and none stands there, that is a part of it.
        """
        left_out = {"name", "hub", "colon_space"} | ({"chat"} if self.chat is None else set())
        facts = {k: v for k, v in asdict(self).items() if k not in left_out}
        between = self.template.split("{text}")[1].split("{label}")[0]
        return facts if self.space or between.endswith("\n") else facts | {"space": ""}


def without_spaces(word: str) -> bool:
    """Whether a word begins in a script whose letters are full-width, which writes no spaces."""
    return unicodedata.east_asian_width(word[0]) in "WF"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            template="Review: {text}\nSentiment:{label}",
            labels=("Negative", "Positive"),
            hub=Hub(
                path="nyu-mll/glue",
                name="sst2",
                train="train",
                test="validation",
                text="sentence",
                label="label",
                revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
            ),
        ),
        Task(
            name="trec",
            template="Question: {text}\nAnswer Type:{label}",
            labels=("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
            hub=Hub(
                path="CogComp/trec",
                name=None,
                train="train",
                test="test",
                text="text",
                label="coarse_label",
                revision="refs/convert/parquet",
            ),
        ),
        Task(
            name="agnews",
            template="Article: {text}\nAnswer:{label}",
            labels=("World", "Sports", "Business", "Technology"),
            hub=Hub(
                path="fancyzhx/ag_news",
                name=None,
                train="train",
                test="test",
                text="text",
                label="label",
                revision="eb185aade064a813bc0b7f42de02595523103ca4",
            ),
        ),
        Task(
            name="emo",
            template="Dialogue: {text}\nEmotion:{label}",
            labels=("Others", "Happy", "Sad", "Angry"),
            hub=Hub(
                path="SemEvalWorkshop/emo",
                name="emo2019",
                train="train",
                test="test",
                text="text",
                label="label",
                revision="refs/convert/parquet",
            ),
        ),
    )
}
"""The four tasks of the paper, with its templates and label words."""


def task(
    name: str | None = None,
    *,
    template: str | None = None,
    labels: Sequence[str] | None = None,
    policy: str | None = None,
) -> Task:
    """One of the four tasks, a TOML file, or a task of one's own.

    Args:
        name: `sst2`, `trec`, `agnews`, `emo`; a `.toml` file with the keys of `Task` (without `hub`); or a name for a new task.
        template, labels, policy: override those of the named task; both of the first two make a new one.

    Raises:
        AnchorsError: unknown name, or a task that cannot work; says why.
    """
    changes: dict[str, Any] = {
        key: value
        for key, value in {
            "template": None if template is None else template.replace("\\n", "\n"),
            "labels": labels if labels is None or isinstance(labels, str) else tuple(labels),
            "policy": policy,
        }.items()
        if value is not None
    }
    if name is not None and name.endswith(".toml"):
        return replace(_from_toml(Path(name)), **changes)
    if name in TASKS:
        if {"template", "labels"} & changes.keys():
            changes["hub"] = None if "labels" in changes else TASKS[name].hub
        return replace(TASKS[name], **changes)
    if template is not None and labels is not None:
        return Task(name=name or "own", **changes)
    if template is not None or labels is not None:
        raise AnchorsError(
            "A task of your own needs both a template and label words.",
            "For example: --template 'Review: {text}\\nSentiment:{label}' --labels Negative,Positive",
            code="task",
        )
    raise AnchorsError(
        f"Unknown task {name!r}.",
        f"{nearest(name, TASKS)} Or give --template and --labels, or a .toml file.",
        code="unknown-name",
    )


def _from_toml(path: Path) -> Task:
    try:
        table = tomllib.loads(decode(path.read_bytes(), f"The task file {str(path)!r}"))
    except OSError as error:
        raise AnchorsError(
            f"The task file {str(path)!r} cannot be read: {error.strerror}.", code="task"
        ) from error
    except AnchorsError:
        raise
    except ValueError as error:
        raise AnchorsError(
            f"The task file {str(path)!r} is not TOML: {error}.",
            'It holds lines such as labels = ["sad", "glad"].',
            code="task",
        ) from error
    except RecursionError as error:
        raise AnchorsError(
            f"The task file {str(path)!r} is nested too deep.", "A task is a flat table.", code="task"
        ) from error
    allowed = {"name", "template", "labels", "policy", "separator", "colon_space"}
    unknown, missing = table.keys() - allowed, {"template", "labels"} - table.keys()
    found = (("has unknown keys", unknown), ("lacks", missing))
    if wrong := [f"{what} {sorted(keys)}" for what, keys in found if keys]:
        raise AnchorsError(
            f"The task file {str(path)!r} {' and '.join(wrong)}.",
            f"Keys: {json.dumps(sorted(allowed))}; template and labels are needed.",
            code="task",
        )
    try:
        facts: dict[str, Any] = {"name": path.stem, **table, "labels": _words(table["labels"])}
        return Task(**facts)
    except AnchorsError as error:
        raise AnchorsError(
            f"The task file {str(path)!r}: {error.message}", error.remedy, code="task"
        ) from error


def _words(labels: Any) -> tuple[str, ...]:
    """Label words of a TOML list; a whole number is the word of its digits."""
    fit = isinstance(labels, list) and all(
        isinstance(label, str | int) and not isinstance(label, bool) for label in labels
    )
    if not fit:
        raise AnchorsError(
            f"labels = {labels!r} is not a list of strings.",
            'For example: labels = ["Negative", "Positive"]',
            code="label-words",
        )
    return tuple(map(str, labels))
