"""Help from docstrings: what a class says of itself, and of each of its attributes."""

import inspect
import re

SECTIONS = ("Attributes", "Args", "Example", "Examples", "Raises", "Returns", "Notes")
_HEADING = re.compile(rf"(?:{'|'.join(SECTIONS)}):\n", re.M)
_ENTRY = re.compile(r"([\w, ]+): (.*)", re.S)


def prose(thing: object) -> str:
    """What stands before the first section: paragraphs as single lines, equations and lists as they are."""
    text = inspect.getdoc(thing) or ""
    paragraphs = re.split(r"\n\s*\n", _HEADING.split(text + "\n", maxsplit=1)[0].strip("\n"))
    return "\n\n".join(p if p.startswith(" ") else re.sub(r"\n(?!- )\s*", " ", p) for p in paragraphs)


def attributes(thing: type) -> dict[str, str]:
    """What the section `Attributes:` of a class says of each; `one, other: text` is said of both."""
    text = inspect.getdoc(thing) or ""
    _, _, after = (text + "\n").partition("Attributes:\n")
    section = re.split(r"^\S", after, maxsplit=1, flags=re.M)[0]
    found = {}
    for entry in re.split(r"^    (?=\S)", section, flags=re.M):
        if match := _ENTRY.fullmatch(" ".join(entry.split())):
            found |= {name.strip(): match[2] for name in match[1].split(",")}
    return found
