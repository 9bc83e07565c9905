"""Where things may be read and written: nothing outside `--out` is touched, nothing outside a model's folder is read."""

import stat
from collections.abc import Iterable
from pathlib import Path

from anchors.errors import AnchorsError

PLACES_OF_STEPS = ("checkpoint", "step", "epoch", "final", "best", "last", "latest", "main", "model")
"""What the last part of a path begins with where the part before it is the model's name."""


def titled(name: str, most: int = 40) -> str:
    """A model's name as it stands in titles: of a path or a hub id the last part that tells something, not too long.

    `/data/models/SmolLM2` is `SmolLM2`, `org/SmolLM2` too; `runs/mine/checkpoint-100` is `mine/checkpoint-100`; a snapshot
    in the hub's cache has the name of its repository.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if "snapshots" in parts[1:]:
        parts = [parts[parts.index("snapshots", 1) - 1].rsplit("--", 1)[-1]]
    last = parts[-1] if parts else name
    if len(parts) > 1 and last.lower().split("-")[0].split("_")[0] in PLACES_OF_STEPS:
        last = f"{parts[-2]}/{last}"
    last = last.removesuffix(".gguf")
    half = (most - 1) // 2
    return last if len(last) <= most else f"{last[:half]}…{last[-half:]}"


def told_apart(names: Iterable[str], most: int = 40) -> dict[str, str]:
    """By name of a model its title, see `titled`; the whole name where two models would have the same one."""
    titles = {name: titled(name, most) for name in names}
    return {name: title if [*titles.values()].count(title) == 1 else name for name, title in titles.items()}


def require_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse files of a model's folder that are links to somewhere else.

    In a snapshot of the hub's cache every file is a link to the blobs beside it; those belong to the model.

    Args:
        folder: of the model.
        paths: files in it; of a directory, everything below counts.

    Raises:
        AnchorsError: one leads out of the folder.
    """
    homes = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        homes.append((folder.absolute().parents[1] / "blobs").resolve())
    for path in paths:
        for own in [path, *(sorted(path.rglob("*")) if path.is_dir() else ())]:
            real = own.resolve()
            if not any(real.is_relative_to(home) for home in homes):
                raise AnchorsError(
                    f"{str(own)!r} is a link to {str(real)!r}, outside the model's folder.",
                    "Put a copy of the file in its place, if it belongs to the model.",
                    code="outside",
                )


def require_another(out: Path, inputs: Iterable[str | Path | None], option: str = "--out") -> None:
    """Refuse an output that would take the place of something that is read.

    Args:
        out: the file to be written.
        inputs: files that are read, or folders, of which no file may be replaced; what is no path here is no matter.
        option: what the user called the output.

    Raises:
        AnchorsError: it is one of them, or lies in one; or something that is no file is there.
    """
    target = out.expanduser().resolve()
    for source in inputs:
        place = Path(str(source)).expanduser()
        if source is None or not place.exists():
            continue
        if target == place.resolve() or (place.is_dir() and target.is_relative_to(place.resolve())):
            raise AnchorsError(
                f"{option} {str(out)!r} would be written over {str(source)!r}, which is read.",
                f"Choose another {option}.",
                code="would-overwrite",
            )
    require_file(out.expanduser())


def require_file(path: Path) -> None:
    """Refuse to put a file where something stands that is none: a device, a pipe, a socket, a link.

    A file that is written whole takes the place of what bears its name: /dev/null, or the link /dev/stdout, would be gone.

    Raises:
        AnchorsError: it is something else.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing there, or no way there: whoever writes will see
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a device, a pipe or a socket"
        raise AnchorsError(
            f"{str(path)!r} is {what}, not a file: it would be replaced.",
            "Give the name of a file, new or old.",
            code="would-overwrite",
        )


def refuse_revision(source: str | Path, revision: str | None) -> None:
    """Refuse a revision of a model that lies on this machine, where it would be ignored.

    Raises:
        AnchorsError: there is such a folder or file.
    """
    if revision is not None and Path(source).expanduser().exists():
        raise AnchorsError(
            f"The model {str(source)!r} lies on this machine, where it has no revision {revision!r}.",
            "Leave the revision out, or give the model's hub id.",
            code="model-not-found",
        )


def file_name(text: str, what: str) -> str:
    """A name that becomes part of a file's name, as it is.

    Raises:
        AnchorsError: it holds what would lead into another folder, or no file system takes.
    """
    if (
        text in ("", ".", "..")
        or any(sign in "/\\\0" or ord(sign) < 32 for sign in text)
        or len(text.encode()) > 150
    ):
        raise AnchorsError(
            f"The name {text[:80]!r} of {what} cannot be part of a file's name.",
            "Use letters, digits, spaces, dots, - and _, at most 150 bytes.",
            code="option-value",
        )
    return text
