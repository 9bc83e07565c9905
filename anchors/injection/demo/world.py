"""A world of pictures, the words that describe them, and what can be asked about them: the data of `inject demo`.

A scene is what a picture shows. `World.describe` says it in words, so that every question about a picture can be asked
about a text, too. A vision-language model is trained on the caption and on the vision questions, on pictures; an expert
on the questions of one skill, on texts only. So a question of a skill about a picture is new to either.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from anchors._names import forwarding
from anchors.injection.demo.words import (
    COLOURS,
    FOREIGN,
    LANGUAGES,
    NUMBERS,
    SHAPES,
    Word,
    in_words,
    plural,
)

SKILLS = ("instruction", "crosslingual", "mathematics")


@dataclass(frozen=True)
class Scene:
    """What a picture shows: a handwritten digit, or some objects of one shape and colour.

    Attributes:
        number: the digit, or how many objects.
        shape: None for a digit.
        colour: None for a digit.
    """

    number: int
    shape: str | None = None
    colour: str | None = None

    @property
    def is_digit(self) -> bool:
        return self.shape is None


@dataclass(frozen=True)
class Asked:
    """A question about a scene, with its answer.

    Attributes:
        label: the word of the answer that depends on the scene, where there is just one.
        text: what is asked about, where it is not the scene's description.
    """

    kind: str
    question: str
    answer: str
    label: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class QuestionKind:
    """One kind of question.

    Attributes:
        kind: its name.
        about: `digits`, `objects` or `all`: the scenes it can be asked about.
        ask: from a scene to the parts of `Asked` after its kind; numbers in a question are drawn.
    """

    kind: str
    about: str
    ask: Callable[
        [Scene, np.random.Generator],
        tuple[str, str, str | None] | tuple[str, str, str | None, str | None],
    ]

    def fits(self, scene: Scene) -> bool:
        return self.about == "all" or (self.about == "digits") == scene.is_digit

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Asked:
        return Asked(self.kind, *self.ask(scene, rng))


@dataclass(frozen=True)
class World:
    """Everything that can be seen and asked.

    Attributes:
        name: of a scale: `tiny`, `tiny-patches`, `135m` or `135m-digits`.
        template: of a prompt, with `{image}` and `{question}`.
        answer: how an answer follows on a prompt.
        separator: between a demonstration's answer and the next prompt.
        describe: what a scene's picture shows, in words.
        caption: the question that is answered by `describe`.
        vision: questions a vision-language model is trained on.
        skills: questions an expert is trained on, by skill.
        lore: what a new base learns besides: the skills' words, but never about a scene.
        shapes: of objects; none for a world of digits.
        colours: of objects.
    """

    name: str
    template: str
    answer: str
    separator: str
    describe: Callable[[Scene], str]
    caption: QuestionKind
    vision: tuple[QuestionKind, ...]
    skills: Mapping[str, tuple[QuestionKind, ...]]
    lore: tuple[QuestionKind, ...] = ()
    shapes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()

    def scenes(self) -> Iterator[Scene]:
        """Every scene there is."""
        yield from (Scene(digit) for digit in range(10))
        for shape in self.shapes:
            for colour in self.colours:
                yield from (Scene(count, shape, colour) for count in range(1, 10))

    def tasks(self, scenario: str) -> tuple[QuestionKind, ...]:
        """The questions of a scenario: a skill, or `vision`."""
        return self.vision if scenario == "vision" else self.skills[scenario]


def world(name: str) -> World:
    """The world of a scale."""
    return {"tiny": _tiny, "tiny-patches": _tiny, "135m": _large, "135m-digits": _large_digits}[name]()


def _fixed(kind: str, about: str, question: str, answer: Callable[[Scene], str]) -> QuestionKind:
    """A question without numbers, whose answer is one word."""

    def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
        word = answer(scene)
        return question, word, word

    return QuestionKind(kind, about, ask)


def _caption(question: str, describe: Callable[[Scene], str]) -> QuestionKind:
    return QuestionKind("caption", "all", lambda scene, rng: (question, describe(scene), None))


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _number(scene: Scene) -> str:
    return NUMBERS[scene.number]


def _tiny() -> World:
    """Digits, one symbol each; questions of one or two words."""

    def shaped(name: str, form: str) -> QuestionKind:
        def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
            word = _number(scene).upper() if name == "capitals" else _number(scene)
            return f"name {name}", form.format(word), word

        return QuestionKind(name, "digits", ask)

    def language(name: str) -> QuestionKind:
        return _fixed(name, "digits", f"name {name.lower()}", lambda scene: FOREIGN[name][_number(scene)])

    def sum_with(name: str, sign: int) -> QuestionKind:
        def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
            # No result below zero, and as many operands for every digit as can be.
            other = int(rng.integers(0, 10 if sign > 0 else scene.number + 1))
            result = NUMBERS[scene.number + sign * other]
            return f"{name} {NUMBERS[other]}", result, result

        return QuestionKind(name, "digits", ask)

    def describe(scene: Scene) -> str:
        return f"#{scene.number}"

    def told(
        kind: str, question: str, draw: Callable[[np.random.Generator], tuple[str, str]]
    ) -> QuestionKind:
        """A question about a drawn text, whatever the scene is."""

        def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str, str]:
            text, answer = draw(rng)
            return question, answer, answer, text

        return QuestionKind(kind, "all", ask)

    digits = NUMBERS[:10]
    lists = [NUMBERS[:19], tuple(map(str.upper, digits))]
    lists += [tuple(FOREIGN[name][word] for word in digits) for name in ("French", "German")]
    forms = {"bracket": "[ {0} ]", "twice": "{0} {0}", "capitals": "{0}"}

    def following(rng: np.random.Generator) -> tuple[str, str]:
        own = lists[rng.integers(len(lists))]
        place = int(rng.integers(len(own) - 1))
        return own[place], own[place + 1]

    def tongue(rng: np.random.Generator) -> tuple[str, str]:
        name = ("French", "German")[rng.integers(2)]
        return FOREIGN[name][digits[rng.integers(10)]], name.lower()

    def form(rng: np.random.Generator) -> tuple[str, str]:
        name = list(forms)[rng.integers(len(forms))]
        word = digits[rng.integers(10)]
        return forms[name].format(word.upper() if name == "capitals" else word), name

    skills = {
        "instruction": tuple(shaped(name, pattern) for name, pattern in forms.items()),
        "crosslingual": (language("French"), language("German")),
        "mathematics": (
            sum_with("plus", 1),
            sum_with("minus", -1),
            _fixed("double", "digits", "double", lambda scene: NUMBERS[2 * scene.number]),
        ),
    }
    return World(
        name="tiny",
        template="{image} {question} =",
        answer=" {answer}",
        separator=" ; ",
        describe=describe,
        caption=_caption("describe", describe),
        vision=(
            _fixed("name", "digits", "name", _number),
            _fixed("even", "digits", "even", lambda scene: _yes(scene.number % 2 == 0)),
            _fixed("big", "digits", "big", lambda scene: _yes(scene.number > 4)),
        ),
        skills=skills,
        lore=(
            told("next", "next", following),
            told("language", "language", tongue),
            told("form", "form", form),
        ),
    )


ATTRIBUTES: dict[str, tuple[str, str, Callable[[Scene], Word]]] = {
    "name": ("digits", "Which digit is this?", lambda scene: NUMBERS[scene.number]),
    "count": ("objects", "How many objects are there?", lambda scene: NUMBERS[scene.number]),
    "colour": ("objects", "What colour are the objects?", lambda scene: str(scene.colour)),
    "shape": ("objects", "What shape are the objects?", lambda scene: str(scene.shape)),
}
"""By kind: what it can be asked about, the question, the answer."""

FORMS = {
    "brackets": ("Answer in square brackets.", "[{0}]"),
    "twice": ("Say it twice.", "{0} {0}"),
    "capitals": ("Answer in capital letters.", "{0}"),
    "json": ("Answer as JSON.", '{{"answer": "{0}"}}'),
    "sentence": ("Begin with: The answer is", "The answer is {0}"),
}
"""By kind: the instruction, and what it makes of a word."""


def _large() -> World:
    """Digits and objects, described and asked about in English."""

    def describe(scene: Scene) -> str:
        if scene.is_digit:
            return f"a picture of the digit {_number(scene)}"
        return f"a picture of {_number(scene)} {scene.colour} {plural(str(scene.shape), scene.number)}"

    def shaped(form: str, attribute: str) -> QuestionKind:
        about, question, value = ATTRIBUTES[attribute]
        instruction, pattern = FORMS[form]

        def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
            word = value(scene).upper() if form == "capitals" else value(scene)
            return f"{question} {instruction}", pattern.format(word), word

        return QuestionKind(form, about, ask)

    def language(name: str, attribute: str) -> QuestionKind:
        about, question, value = ATTRIBUTES[attribute]
        return _fixed(name, about, f"{question} Answer in {name}.", lambda scene: FOREIGN[name][value(scene)])

    def problem(
        kind: str, about: str, text: str, result: Callable[[int, int], int], most: int
    ) -> QuestionKind:
        def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
            top = min(most, scene.number) if kind in ("minus", "taken") else most
            other = int(rng.integers(min(1, top), top + 1))
            word = in_words(result(scene.number, other))
            return text.format(NUMBERS[other]), word, word

        return QuestionKind(kind, about, ask)

    return World(
        name="135m",
        template="{image}\n{question}\nAnswer:",
        answer=" {answer}",
        separator="\n",
        describe=describe,
        caption=_caption("What does the picture show?", describe),
        vision=(
            *(_fixed(kind, about, text, value) for kind, (about, text, value) in ATTRIBUTES.items()),
            _fixed("even", "digits", "Is the digit even?", lambda scene: _yes(scene.number % 2 == 0)),
            _fixed("big", "digits", "Is the digit above four?", lambda scene: _yes(scene.number > 4)),
        ),
        skills={
            "instruction": tuple(shaped(form, attribute) for form in FORMS for attribute in ATTRIBUTES),
            "crosslingual": tuple(
                language(name, attribute) for name in LANGUAGES for attribute in ATTRIBUTES
            ),
            "mathematics": (
                problem("plus", "digits", "What is the digit plus {0}?", lambda a, b: a + b, 9),
                problem("minus", "digits", "What is the digit minus {0}?", lambda a, b: a - b, 9),
                problem("double", "digits", "What is twice the digit?", lambda a, b: 2 * a, 1),
                problem(
                    "times two", "objects", "What is twice the number of objects?", lambda a, b: 2 * a, 1
                ),
                problem(
                    "added",
                    "objects",
                    "Anna puts {0} more objects into the picture. How many are there now?",
                    lambda a, b: a + b,
                    9,
                ),
                problem(
                    "taken",
                    "objects",
                    "Anna takes {0} of the objects away. How many are left?",
                    lambda a, b: a - b,
                    9,
                ),
                problem(
                    "cost",
                    "objects",
                    "Each object costs {0} coins. How many coins do all of them cost?",
                    lambda a, b: a * b,
                    5,
                ),
            ),
        },
        shapes=tuple(SHAPES),
        colours=tuple(COLOURS),
    )


def _large_digits() -> World:
    """The larger world without its objects."""
    whole = _large()

    def kept(tasks: tuple[QuestionKind, ...]) -> tuple[QuestionKind, ...]:
        return tuple(task for task in tasks if task.about != "objects")

    return replace(
        whole,
        name="135m-digits",
        vision=kept(whole.vision),
        skills={skill: kept(tasks) for skill, tasks in whole.skills.items()},
        shapes=(),
        colours=(),
    )


__getattr__ = forwarding(__name__)
