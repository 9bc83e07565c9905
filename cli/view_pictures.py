"""`anchors view` on questions about pictures."""

from dataclasses import dataclass
from pathlib import Path

from anchors.cli import common
from anchors.cli.common import err, shown


@dataclass(frozen=True)
class Asked:
    """What a user asks about pictures: as `anchors.injection.image_flow.questions` reads it."""

    source: str
    ask: str | None
    truth: str | None
    demonstrations: Path | None
    template: str | None


def about_pictures(source: str) -> bool:
    """Whether a prompt's name stands for questions about pictures: quickly, since mostly it does not."""
    return source.endswith(".jsonl") or (source == "tiny-vlm" and not Path(source).exists())


def view(
    asked: Asked,
    model: str | None,
    device: str,
    precision: str,
    revision: str | None,
    layers: str | None,
    to: Path,
) -> None:
    """Write the page."""
    from anchors.places import require_another
    from anchors.study.results import provenance, require_writable, write_atomic

    common.load_libraries()
    from anchors.injection.asking.vlm import TINY, load_vlm
    from anchors.injection.image_flow import questions
    from anchors.injection.image_flow.flow import demand
    from anchors.injection.image_flow.shown import picture_page

    found = questions.questions_in(asked.source, asked.ask, asked.truth)
    before = [] if asked.demonstrations is None else questions.questions_in(str(asked.demonstrations))
    name = TINY if model is None else model
    template = (asked.template or "").replace("\\n", "\n") or questions.TEMPLATES.get(
        name, questions.TEMPLATE
    )
    names = [one.name for one in found]
    prompts = {
        one.name if names.count(one.name) == 1 else f"{one.name} ({n})": questions.written(
            template, one, before
        )
        for n, one in enumerate(found, 1)
    }
    read = [asked.source, model, asked.demonstrations, *(one.image for one in found)]
    require_another(to, read)
    if to.suffix != ".html" or to.is_dir():
        to = to / "view.html"
        require_another(to, read)
    require_writable(to.parent)
    with err.status(f"loading {name}"):
        vlm = load_vlm(name, device=device, precision=precision, revision=revision, routed=True)
    wanted = common.layers_from(layers, vlm.layers)
    for prompt in prompts.values():
        demand(vlm, [prompt])
    facts = provenance(
        model=vlm.name,
        fingerprint=vlm.fingerprint,
        precision=vlm.precision,
        device=str(vlm.device),
        template=template,
    )
    page = picture_page(vlm, prompts, facts, wanted)
    write_atomic(to, lambda draft: draft.write_text(page, encoding="utf-8"))
    err.print(shown(to))
