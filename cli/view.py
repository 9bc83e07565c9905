"""`anchors view`: the page for a prompt of one's own."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from anchors.cli import common
from anchors.cli.common import err, shown
from anchors.cli.setting import DryRun


def view(
    prompt: Annotated[
        str,
        typer.Argument(
            help="Text file with demonstrations and query, or - for standard input. With --ask a picture or a folder of some; "
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

    Questions about pictures go to a vision-language model (without --model: tiny-vlm, which reads handwritten digits, and
    comes along): the page shows on the picture how much flows from each patch to the answer, layer by layer. There --truth
    is the right answer, and --template holds <image>, {question} and {answer}.
    """
    with common.reporting():
        from anchors.cli import view_pictures
        from anchors.errors import AnchorsError

        if ask is not None or demonstrations is not None or view_pictures.about_pictures(prompt):
            only = {
                "--task": task, "--labels": labels, "--policy": policy, "--chat": chat, "--system": system, "--maps": maps,
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

        try:
            content = sys.stdin.buffer.read() if prompt == "-" else Path(prompt).read_bytes()
        except OSError as error:
            raise AnchorsError(
                f"The prompt {prompt!r} cannot be read: {error.strerror}.",
                "Name a text file, or give - and the prompt on standard input.",
                code="file-unreadable",
            ) from error
        from anchors.tasks.files import decode

        text = decode(content, f"The prompt {prompt!r}").replace("\r\n", "\n").replace("\r", "\n")
        if not text.strip():
            raise AnchorsError("The prompt is empty.", "Give demonstrations and a query.", code="prompt")
        if labels is not None and template is None and task is None:
            from anchors.tasks.prompts import task_of

            chosen = task_of(text, [word.strip() for word in labels.split(",")], policy)
        else:
            chosen, *others = common.tasks_from([task] if task else [], template, labels, policy)
            if others:
                raise AnchorsError(
                    f"A page shows one prompt of one task; --task {task!r} names several.",
                    "Name one.",
                    code="options-together",
                )
        from dataclasses import replace

        from anchors.tasks.prompts import found_in

        chosen = replace(chosen, chat=common.chat_from(chat, system))
        found_in(text, chosen, truth)
        from anchors.places import require_another
        from anchors.study.results import provenance, require_writable, write_atomic

        read = [None if prompt == "-" else prompt, task, model]
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
        lm = common.load_model(model, device, precision, device_map, revision, trust_remote_code, [chosen])
        from anchors.tasks.drawing import Drawn, within_context
        from anchors.tasks.prompts import from_text
        from anchors.viewer import render_page
        from anchors.viewer.payload import payload, prompt_payload

        built = from_text(text, chosen, lm.tokenizer, truth=truth)
        within_context([Drawn(0, built)], lm.context)
        if dry_run:
            from anchors.study.plan import of_prompt

            told = of_prompt(lm, chosen.called, len(built.ids), 1 + (built.gold is None) + (maps is not None))
            common.print_outlook({"view": [told]}, as_json=False)
            return
        from anchors.certificate.sight import hidden_labels
        from anchors.check import demand

        # Without a right answer, the identity holds for any class.
        demand(lm, [built if built.gold is not None else replace(built, gold=0)])
        common.print_notes([note for note in [lm.beside_attention, hidden_labels(lm, [built])] if note])
        facts = provenance(
            model=lm.name, fingerprint=lm.fingerprint, precision=lm.precision, device=str(lm.device)
        )
        wanted = common.layers_from(layers, lm.layers)
        name = "standard input" if prompt == "-" else Path(prompt).name
        shown_prompt = prompt_payload(lm, chosen, built, name, wanted)
        page = render_page(payload("Information flow", lm, chosen, [shown_prompt], facts))
        write_atomic(to, lambda draft: draft.write_text(page, encoding="utf-8"))
        err.print(shown(to))
        if maps is not None:
            from safetensors.torch import save_file

            from anchors.flow import flow

            gold = shown_prompt["predicted"] if built.gold is None else built.gold
            full = flow(lm, [replace(built, gold=gold)], maps=wanted).maps
            tensors = {f"layer_{layer}": full[layer][0].contiguous() for layer in wanted}
            write_atomic(maps, lambda draft: save_file(tensors, draft))
            err.print(shown(maps))
