"""One image-text family: logits and image flow of its language tower on the seam, against its own eager attention.

What a family wants to see differs (pixels, patches, grids). `seen` tries the known forms until the untouched model takes
one; the prompt then holds as many image tokens as it makes features. One image stands before the demonstrations, one
before the query's text; a family that takes one image only gets the latter.
"""

import copy
import dataclasses
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep import family as causal
from sweep import tiny
from sweep.facts import Fact, apart
from sweep.family import Row, attempt, place, said
from sweep.oracle import block_of, watching
from sweep.right import Asked, Group

NUMBERS = ("logits", "image sums")
Tensors = dict[str, Tensor]


def forms(model: nn.Module, count: int) -> Iterator[Tensors]:
    """What a model may want to be shown as some random images."""
    eyes = next(
        (
            c
            for n in ("vision_config", "vit_config", "vq_config")
            if (c := getattr(model.config, n, None)) is not None
        ),
        None,
    )
    side, patch = (getattr(eyes, name, default) for name, default in (("image_size", 16), ("patch_size", 8)))
    side, patch = (x[0] if isinstance(x, list | tuple) else x for x in (side, patch))
    side, patch = side if isinstance(side, int) else 16, patch if isinstance(patch, int) else 8
    merge = getattr(eyes, "spatial_merge_size", None) or 2
    frames = getattr(eyes, "temporal_patch_size", None) or 1
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    grid = 2 * merge
    sizes = torch.tensor([[side, side]] * count)
    thw = torch.tensor([[1, grid, grid]] * count)
    cells = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="xy"), -1).view(
        1, -1, 2
    )
    for depth in dict.fromkeys((frames, 1, 2)):
        yield {"pixel_values": noise(count * grid * grid, 3 * depth * patch * patch), "image_grid_thw": thw}
        yield {"pixel_values": noise(count * grid * grid, 3 * depth * patch * patch), "image_grid_thw": thw, "image_merge_sizes": torch.tensor([merge] * count)}  # fmt: skip
    yield {"pixel_values": noise(count * grid * grid, 3, patch, patch), "image_grid_thw": thw}
    yield {"pixel_values": noise(count, 3, side, side)}
    yield {"pixel_values": noise(count, 3, side, side), "high_res_pixel_values": noise(count, 3, side, side)}
    yield {"pixel_values": noise(count, grid * grid, 3 * patch * patch)}
    yield {"pixel_values": noise(count, 3, side, side), "image_sizes": sizes}
    yield {"pixel_values": noise(1, count, 3, side, side)}
    yield {
        "pixel_values": noise(1, count, 3, side, side),
        "pixel_attention_mask": torch.ones(1, count, side, side, dtype=torch.bool),
    }
    yield {"pixel_values": noise(1, 3, patch, count * grid * grid * patch), "target_sizes": thw[:, 1:]}
    yield {"pixel_values": noise(count, 3, side, side), "qformer_input_ids": torch.ones(count, 3, dtype=torch.long), "qformer_attention_mask": torch.ones(count, 3, dtype=torch.long)}  # fmt: skip
    for tiles in (1, 2, 3, 5):
        yield {"pixel_values": noise(count, tiles, 3, side, side), "image_sizes": sizes}
    yield {
        "pixel_values": noise(count, grid * grid, 3 * patch * patch),
        "image_position_ids": cells.expand(count, -1, -1),
    }
    yield {
        "pixel_values": noise(count, grid * grid, 3 * patch * patch), "spatial_shapes": thw[:, 1:],
        "pixel_attention_mask": torch.ones(count, grid * grid, dtype=torch.long),
    }  # fmt: skip


def _features(model: nn.Module, shown: Tensors) -> int:
    """How many image features a model makes of what it is shown."""
    home = model if hasattr(model, "get_image_features") else model.base_model
    taken = inspect.signature(home.get_image_features).parameters
    swallows = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    out = home.get_image_features(**{n: x for n, x in shown.items() if n in taken or swallows})
    width = model.get_input_embeddings().weight.shape[1]

    def count(found: Any) -> int:
        if isinstance(found, Tensor):
            return found.numel() // width if found.shape[-1] == width else 0
        return sum(map(count, found)) if isinstance(found, list | tuple) else 0

    pooled = getattr(out, "pooler_output", None)
    return count(pooled if pooled is not None else getattr(out, "last_hidden_state", out))


@dataclasses.dataclass(frozen=True)
class Scene:
    """A prompt with images: what the model takes, and where things stand."""

    tensors: Tensors
    labels: list[int]
    target: int
    query: int
    image: list[bool]
    answer: int


def scene(model: nn.Module, prompt: Asked, token: int, shown: Tensors, count: int, swallowed: bool) -> Scene:
    """The prompt with some images; `swallowed` says whether the model may be given what none of its signatures names."""
    taken = inspect.signature(model.forward).parameters
    home = model if hasattr(model, "get_image_features") else model.base_model
    named = {*taken, *inspect.signature(home.get_image_features).parameters}
    if not swallowed and (strange := set(shown) - named):
        raise ValueError(f"names no {', '.join(sorted(strange))}")
    each, rest = divmod(_features(model, shown), count)
    if not each or rest:
        raise ValueError(f"{each * count + rest} features of {count} images")
    first = each if count == 2 else 0
    ids = [token] * first + [*prompt.ids[: prompt.query], *[token] * each, *prompt.ids[prompt.query :]]
    image = [i == token for i in ids]
    kinds = torch.tensor([image]).long()
    asked = torch.tensor([ids])
    tensors = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
    tensors |= {name: x for name, x in shown.items() if name in taken or "kwargs" in taken}
    tensors |= {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in taken}
    return Scene(
        tensors,
        [p + first for p in prompt.labels],
        len(ids) - 1,
        prompt.query + first,
        image,
        prompt.label_ids[prompt.gold],
    )


def seen(model: nn.Module, prompt: Asked, token: int) -> Scene:
    """The first form of images that the untouched model takes."""
    errors = []
    for swallowed, count in ((False, 2), (False, 1), (True, 2), (True, 1)):
        for shown in forms(model, count):
            try:
                with torch.no_grad():
                    found = scene(model, prompt, token, shown, count, swallowed)
                    logits = model(**found.tensors, use_cache=False).logits
                if logits.shape[1] == len(found.image) and logits.isfinite().all():
                    return found
                errors.append(f"logits {tuple(logits.shape)}")
            except Exception as error:  # noqa: BLE001 - the next form
                errors.append(place(error))
    raise ValueError(
        f"takes none of the known forms of images: {'; '.join(dict.fromkeys(e[:110] for e in errors))}"
    )


def maps(model: nn.Module, shown: Scene) -> tuple[Tensor, Tensor, Any]:
    """The logits, I_l of the loss over the whole vocabulary, and what was seen."""
    length = len(shown.image)
    with watching(model, length, length) as found:
        logits = model(**shown.tensors, use_cache=False).logits[0]
    loss = F.cross_entropy(logits[shown.target][None], torch.tensor([shown.answer]))
    slopes = torch.autograd.grad(loss, found.patterns, allow_unused=True)
    flows = [
        torch.zeros(length, length)
        if s is None
        else (p * s)[0, :, :, :length].sum(0).abs().fill_diagonal_(0).detach()
        for p, s in zip(found.patterns, slopes, strict=True)
    ]
    return logits.detach(), torch.stack(flows), found


def sums(flow: Tensor, shown: Scene, sees: list[list[bool]]) -> dict[str, Tensor]:
    """Means over pairs (receiver, giver) by role, as loops; `sees` says which pairs there are."""
    mass: dict[str, list[Tensor]] = {}
    for i in range(shown.target + 1):
        for j in range(shown.target + 1):
            if i == j or not (j < i or sees[i][j]):
                continue
            if i in shown.labels:
                name = "ww" if j > i else "ip" if shown.image[j] else "tp"
            elif i == shown.target and j in shown.labels:
                name = "pq"
            elif i == shown.target and j >= shown.query:
                name = "iq" if shown.image[j] else "tq"
            else:
                name = "ww"
            mass.setdefault(name, []).append(flow[:, i, j].double())
    found = {f"s_{name}": torch.stack(values).mean(0) for name, values in mass.items()}
    return found | {"s_wp": torch.stack(mass.get("ip", []) + mass["tp"]).mean(0)}


def facts(model: nn.Module, shown: Scene, found: Any) -> Iterator[Fact]:
    decoder = model.get_decoder()
    if not getattr(decoder, "_can_set_attn_implementation", lambda: False)():
        yield Fact("transformers itself cannot choose the attention function of its language tower", NUMBERS)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    made = [block_of(name) for name in found.names]
    if len(set(made)) != layers or len(made) != layers:
        yield Fact(
            f"{len(made)} attention patterns over all tokens in {len(set(made))} places, {layers} layers",
            NUMBERS,
        )
    if model.config.is_encoder_decoder:
        yield Fact("an encoder reads the text, a decoder the answer", NUMBERS)
    if (read := shown.tensors.get("qformer_input_ids")) is not None:
        with torch.no_grad():
            moved = apart(model(**shown.tensors | {"qformer_input_ids": read + 1}, use_cache=False).logits[0],
                          model(**shown.tensors, use_cache=False).logits[0])  # fmt: skip
        if moved > 1e-4:
            yield Fact(
                f"another text for its Q-Former (qformer_input_ids) moves the logits at all tokens by {moved:.1e}: image features "
                "are made of the text, too",
                NUMBERS,
            )
    ids = shown.tensors["input_ids"].clone()
    ids[0, -1] = shown.answer
    with torch.no_grad():
        moved = apart(model(**shown.tensors | {"input_ids": ids}, use_cache=False).logits[0, :-1],
                      model(**shown.tensors, use_cache=False).logits[0, :-1])  # fmt: skip
    if moved > 1e-4:
        yield Fact(f"another last token moves earlier logits by {moved:.1e}", NUMBERS)


def _unmasked(shown: Scene) -> Tensors:
    """As the toolkit runs prompts: without a mask, which nothing needs that is padded on the right."""
    return {name: x for name, x in shown.tensors.items() if name != "attention_mask"}


class Toolkit:
    """The tower on the seam; the processor has only what is asked of it: tensors are made here."""

    def __init__(self, model: nn.Module, shown: Scene, tokenizer: Any) -> None:
        from anchors.injection.asking.routing import demand_each_layer, route_tower, witness_of_tower
        from anchors.injection.asking.vlm import prepare_vlm

        images = types.SimpleNamespace(to_json_string=lambda: "{}")
        processor = types.SimpleNamespace(tokenizer=tokenizer, image_token="<image>", image_processor=images)  # noqa: S106
        vlm = prepare_vlm(model, processor, type(model).__name__, "float32")
        witness = witness_of_tower(vlm, None if shown is None else _unmasked(shown))
        self.vlm, self.shown = dataclasses.replace(vlm, modules=route_tower(model), witness=witness), shown
        if shown is not None:
            demand_each_layer(self.vlm, _unmasked(shown), "images")

    def logits(self) -> Tensor:
        from anchors.attention.seam import seam

        with torch.no_grad(), seam(self.vlm.modules):
            return self.vlm.model(**_unmasked(self.shown), use_cache=False).logits[0]

    def sums(self, backward: int) -> dict[str, Tensor]:
        from anchors.injection.image_flow.flow import ImageBatch, image_flow

        at = torch.arange(len(self.shown.image))
        batch = ImageBatch(
            tensors=_unmasked(self.shown),
            labels=torch.tensor([self.shown.labels]),
            target=torch.tensor([self.shown.target]),
            answer=torch.tensor([self.shown.answer]),
            image=torch.tensor([self.shown.image]),
            query=((at >= self.shown.query) & (at <= self.shown.target))[None],
            backward=torch.tensor([backward]),
        )
        return {name: x[0] for name, x in image_flow(self.vlm, batch).sums.items() if name.startswith("s_")}


def sweep(name: str, size: int, edge: int, groups: list[Group], tokenizer: Any) -> list[Row]:
    """Both numbers of an image-text family."""
    about = {"family": name, "kind": "image-text"}
    try:
        model = tiny.build_seeing(name, size + 8, edge)
        token = getattr(model.config, "image_token_id", None) or getattr(
            model.config, "image_token_index", None
        )
        if token is None:
            return _without_token(model, tokenizer, about)
        shown = seen(model, groups[-1].prompts[0], token)
        spare = copy.deepcopy(model)
        logits, flow, found = maps(model.requires_grad_(True), shown)
    except Exception as error:  # noqa: BLE001 - said in the table
        return [Row(number="all", verdict="not tried", reason=place(error), **about)]
    against = attempt(lambda: list(facts(model, shown, found)))
    cause = place(against) if isinstance(against, Exception) else "; ".join(fact.text for fact in against)
    length = len(shown.image)
    sees = torch.stack([own[:, :length] for own in found.visible]).any(0)
    wanted = sums(flow, shown, sees.tolist())
    toolkit = attempt(lambda: Toolkit(spare, shown, tokenizer))
    own = {
        "logits": lambda: {"all": toolkit.logits()},
        "image sums": lambda: toolkit.sums(int(sees.triu(1).sum())),
    }
    rows = []
    for number, right in (("logits", {"all": logits}), ("image sums", wanted)):
        got = toolkit if isinstance(toolkit, Exception) else attempt(own[number])
        rows.append(_judged(number, got, right, about | {"shown": cause, "precision": "float32"}))
    return rows


def _judged(number: str, got: Any, wanted: dict[str, Tensor], about: dict[str, str]) -> Row:
    from anchors.errors import AnchorsError

    if isinstance(got, AnchorsError):
        return Row(number=number, verdict="refused", reason=said(got), **about)
    if isinstance(got, Exception):
        return Row(number=number, verdict="crash", reason=place(got), **about)
    errors = {
        key: causal.off("logits" if number == "logits" else "readout", x, wanted[key])
        if key in wanted
        else float("inf")
        for key, x in got.items()
    }
    worst = max(errors, key=errors.__getitem__)
    exact = errors[worst] <= causal.TOLERANCE["float32"] * (1 if number == "logits" else 10) and set(
        wanted
    ) <= set(got)
    return Row(
        number=number,
        verdict="exact" if exact else "wrong",
        error=errors[worst],
        reason="" if exact else worst,
        **about,
    )


def _without_token(model: nn.Module, tokenizer: Any, about: dict[str, str]) -> list[Row]:
    """A family that puts image features at no token of its own must be refused."""
    cause = "its configuration names no image token"
    got = attempt(lambda: Toolkit(model, None, tokenizer))
    return [_judged(number, got if isinstance(got, Exception) else ValueError("taken without an image token"), {}, about | {"shown": cause, "precision": "float32"}) for number in NUMBERS]  # fmt: skip
