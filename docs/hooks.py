"""Pages that stand elsewhere in the repository, brought into the site with their pictures.

A link in them to another page of the site leads there; one to a file that the site does not have (code, rows) is left as
its text; one to nothing at all is an error.
"""

import os
import re
import shutil
from pathlib import Path

from properdocs.plugins import event_priority
from properdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "ARCHITECTURE.md": "house/ARCHITECTURE.md",
    "CONTRIBUTING.md": "house/CONTRIBUTING.md",
    "CHANGELOG.md": "house/CHANGELOG.md",
    "findings/README.md": "house/FINDINGS.md",
    "experiments/RESULTS.md": "results/RESULTS.md",
    "experiments/NSA.md": "results/NSA.md",
    "experiments/INJECTION.md": "results/INJECTION.md",
}
"""By path in the repository: the path in the site."""
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


@event_priority(100)  # before mkdocstrings, which looks but once for its paths
def on_config(config):
    """One tree for the API pages: what stands beside `anchors/` is a part of it once installed."""
    tree = ROOT / "build" / "api" / "anchors"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "anchors", tree, ignore=not_code)
    for name in ("cli", "experiments", "figures"):
        shutil.copytree(ROOT / name, tree / name, ignore=not_code)
    return config


def not_code(folder: str, names: list[str]) -> list[str]:
    return [
        n for n in names if not (n.endswith((".py", ".pyi")) or (Path(folder) / n / "__init__.py").is_file())
    ]


def on_files(files: Files, config) -> Files:
    pictures: dict[str, Path] = {}
    for source, target in PAGES.items():
        text = rewritten((ROOT / source).read_text(encoding="utf-8"), source, target, pictures)
        files.append(File.generated(config, target, content=text))
    for target, path in pictures.items():
        files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def rewritten(text: str, source: str, target: str, pictures: dict[str, Path]) -> str:
    """A page of the repository with links that hold in the site; what pictures it needs is put into `pictures`."""

    def link(found: re.Match) -> str:
        image, words, to, anchor = found.group(1), found.group(2), found.group(3), found.group(4) or ""
        if not to or "://" in to:
            return found.group(0)
        path = ((ROOT / source).parent / to).resolve()
        if not path.exists():
            raise ValueError(f"{source} links to {to!r}, which is not there")
        inside = path.relative_to(ROOT).as_posix()
        if image:
            place = f"results/{inside.removeprefix('experiments/')}"
            pictures[place] = path
        elif inside in PAGES:
            place = PAGES[inside]
        elif inside.startswith("docs/") and path.suffix == ".md":
            place = inside.removeprefix("docs/")
        else:
            return words
        return f"{image}[{words}]({os.path.relpath(place, Path(target).parent)}{anchor})"

    return LINK.sub(link, text)
