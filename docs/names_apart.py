"""For the API pages: a line of a docstring that describes several names (`q, k, v: …`) stands for each of them."""

import re

import griffe

GROUPED = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: {4}.*)?\n?)*", re.MULTILINE)


def apart(text: str) -> str:
    """The docstring with one line a name."""

    def each(found: re.Match) -> str:
        return "\n".join(f"    {name}: {found.group(2)}" for name in found.group(1).split(", "))

    return SECTION.sub(lambda section: GROUPED.sub(each, section.group(0)), text)


class NamesApart(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = apart(obj.docstring.value)
