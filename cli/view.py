"""`anchors view`: the page for a prompt of one's own."""

import errno
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchors.cli import common
from anchors.cli.common import err, shown
from anchors.cli.setting import DryRun

if TYPE_CHECKING:
    from anchors.tasks.task import Task


def view(
    prompt: Annotated[
        str,
        typer.Argument(
            help="Text file with demonstrations and query, or with any text and --target; the text itself; or - for standard input. With --ask a picture or a folder of some; "
            "or questions about pictures: a .jsonl file, or tiny-vlm."
        ),
    ],
    model: common.Model = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", "-t", help="Whose template and label words the prompt uses.", rich_help_panel="Task"
        ),
    ] = None,
    template: common.Template = None,
    labels: common.Labels = None,
    policy: common.Policy = None,
    chat: common.ChatForm = None,
    system: common.System = None,
    truth: Annotated[
        str | None,
        typer.Option(
            help="The right label; without it the loss is that of the model's own prediction.",
            rich_help_panel="Task",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Show the flow of −log p of this next token instead of that of the loss over label words, which the prompt then need "
            "not have: a text, #1234 (an id), or top (the model's own next token).",
            rich_help_panel="Target",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="With --target: the flow of the log-odds of that token against this one (top: the likeliest other one).",
            rich_help_panel="Target",
        ),
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            help="A question about a picture, or about each picture of a folder.", rich_help_panel="Pictures"
        ),
    ] = None,
    demonstrations: Annotated[
        Path | None,
        typer.Option(
            help="Answered questions about pictures that are shown before each: JSON lines with image, question, answer.",
            rich_help_panel="Pictures",
        ),
    ] = None,
    device: common.Device = "auto",
    precision: common.Precision = "auto",
    device_map: common.DeviceMap = None,
    revision: common.Revision = None,
    trust_remote_code: common.Remote = False,
    layers: Annotated[
        str | None, typer.Option(help="Layers on the page, e.g. 0,5,10-12.", rich_help_panel="Output")
    ] = None,
    to: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the page view.html, or a name for it in .html.",
            rich_help_panel="Output",
        ),
    ] = Path("results"),
    maps: Annotated[
        Path | None,
        typer.Option(
            help="Write I_l of these layers, too (safetensors, T × T each).", rich_help_panel="Output"
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write the page for one prompt: tokens by role, flow by layer, label probabilities.

    Label words are found where the template puts them, e.g. after "\\nSentiment:". With --labels and no --template,
    what stands before them is the prompt's last line.

    With --target any text will do, and label words are looked for only where --task, --template or --labels name them: the page
    shows what flows into the last token, from every token, when the model predicts the one that is named.

    Questions about pictures go to a vision-language model (without --model: tiny-vlm, which reads handwritten digits, and
    comes along): the page shows on the picture how much flows from each patch to the answer, layer by layer. There --truth
    is the right answer, and --template holds <image>, {question} and {answer}.
    """
    with common.reporting():
        from anchors.cli import view_pictures
        from anchors.errors import AnchorsError

        if ask is not None or demonstrations is not None or view_pictures.about_pictures(prompt):
            only = {
                "--target": target, "--against": against, "--task": task, "--labels": labels, "--policy": policy, "--chat": chat, "--system": system, "--maps": maps,
                "--device-map": device_map,
                "--trust-remote-code": trust_remote_code or None, "--dry-run": dry_run or None,
            }  # fmt: skip
            if given := [name for name, value in only.items() if value is not None]:
                raise AnchorsError(
                    f"{given[0]} is not for questions about pictures.",
                    "Leave it out.",
                    code="options-together",
                )
            asked = view_pictures.Asked(prompt, ask, truth, demonstrations, template)
            view_pictures.view(asked, model, device, precision, revision, layers, to)
            return

        if against is not None and target is None:
            raise AnchorsError(
                "--against without --target: there is nothing to hold against it.",
                "Add --target, such as --target top.",
                code="options-together",
            )
        text, name = _read(prompt)
        form = common.chat_from(chat, system)
        chosen = None
        if target is None or any(own is not None for own in (task, template, labels, policy, truth)):
            chosen = _task(text, task, template, labels, policy)
            from anchors.tasks.prompts import found_in

            chosen = replace(chosen, chat=form)
            found_in(text, chosen, truth)
        from anchors.places import require_another
        from anchors.study.results import provenance, require_writable, write_atomic

        read = [None if name is None else prompt, task, model]
        require_another(to, read)
        if to.suffix != ".html" or to.is_dir():
            to = to / "view.html"
            require_another(to, read)
        if maps is not None:
            require_another(maps, [*read, to], "--maps")
            if maps.resolve() == to.resolve():
                raise AnchorsError(
                    f"--maps {str(maps)!r} is the page, too.",
                    "Give them different names.",
                    code="would-overwrite",
                )
            require_writable(maps.parent)
        require_writable(to.parent)
        lm = common.load_model(
            model, device, precision, device_map, revision, trust_remote_code, [chosen] if chosen else []
        )
        from anchors.flow.aiming import likeliest, spaced
        from anchors.tasks import aims
        from anchors.tasks.drawing import Drawn, within_context
        from anchors.tasks.prompts import from_text
        from anchors.viewer import render_page
        from anchors.viewer.payload import payload, prompt_payload

        if chosen is None:
            built, place = aims.of_text(text.removesuffix("\n"), lm.tokenizer, form, before=(target, against))
        else:
            built = from_text(text, chosen, lm.tokenizer, truth=truth)
            place = aims.of_task(built, chosen, lm.tokenizer)
        within_context([Drawn(0, built)], lm.context)
        notes = []
        if target is not None:
            built = aims.aimed(built, place, lm.tokenizer, target, against, likeliest=likeliest(lm))
            notes = spaced(lm, built, place, (target, against))
        if dry_run:
            from anchors.study.plan import of_prompt

            called = "prompt" if chosen is None else chosen.called
            told = of_prompt(lm, called, len(built.ids), 1 + (built.loss is None) + (maps is not None))
            common.print_outlook({"view": [told]}, as_json=False)
            return
        from anchors.certificate.sight import hidden_labels
        from anchors.check import demand

        # Without a right answer, the identity holds for any class.
        demand(lm, [built if built.loss is not None else replace(built, gold=0)])
        common.print_notes([note for note in [lm.beside_attention, hidden_labels(lm, [built])] if note])
        facts = provenance(
            model=lm.name, fingerprint=lm.fingerprint, precision=lm.precision, device=str(lm.device)
        )
        wanted = common.layers_from(layers, lm.layers)
        called = name or ("standard input" if prompt == "-" else "prompt")
        shown_prompt = prompt_payload(lm, chosen, built, called, wanted, notes)
        if target is not None:
            common.print_notes([note for note in shown_prompt["notes"] if note != lm.beside_attention])
        page = render_page(payload("Information flow", lm, chosen, [shown_prompt], facts))
        write_atomic(to, lambda draft: draft.write_text(page, encoding="utf-8"))
        err.print(shown(to))
        if maps is not None:
            from safetensors.torch import save_file

            from anchors.flow import flow

            known = built if built.loss is not None else replace(built, gold=shown_prompt["predicted"])
            full = flow(lm, [known], maps=wanted).maps
            tensors = {f"layer_{layer}": full[layer][0].contiguous() for layer in wanted}
            write_atomic(maps, lambda draft: save_file(tensors, draft))
            err.print(shown(maps))


def _read(prompt: str) -> tuple[str, str | None]:
    """The prompt's text, and the name of its file; None where it was given as it is."""
    from anchors.errors import AnchorsError
    from anchors.tasks.files import decode

    try:
        content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt).read_bytes()
    except OSError as error:
        absent = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
        if absent and any(map(str.isspace, prompt)) and not prompt.endswith(".txt"):
            return prompt, None
        raise AnchorsError(
            f"The prompt {prompt!r} cannot be read: {error.strerror}.",
            "Name a text file, write a text of several words, or give - and the prompt on standard input.",
            code="file-unreadable",
        ) from error
    text = decode(content, f"The prompt {prompt!r}").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise AnchorsError("The prompt is empty.", "Give demonstrations and a query.", code="prompt")
    return text, None if prompt == "-" else Path(prompt).name


def _task(
    text: str, task: str | None, template: str | None, labels: str | None, policy: str | None
) -> "Task":
    """Whose label words the prompt has."""
    from anchors.errors import AnchorsError

    if labels is not None and template is None and task is None:
        from anchors.tasks.prompts import task_of

        return task_of(text, [word.strip() for word in labels.split(",")], policy)
    chosen, *others = common.tasks_from([task] if task else [], template, labels, policy)
    if others:
        raise AnchorsError(
            f"A page shows one prompt of one task; --task {task!r} names several.",
            "Name one.",
            code="options-together",
        )
    return chosen
