"""Train on answers, and measure them: the loops that all stages share."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchors.injection.demo.pictures import Pictures
from anchors.injection.demo.prompts import IGNORED, Prompts
from anchors.injection.demo.scales import Scale, Stage
from anchors.training import State, Team, arithmetic, take_steps

Told = Callable[[int], None]
"""Told how many steps of a stage are done."""
OFTEN, KEPT = 50, 500
"""Steps between looks at the loss, and between checkpoints."""


def fit(
    groups: Sequence[tuple[list[nn.Parameter], float]],
    loss: Callable[[int], Tensor],
    stage: Stage,
    scale: Scale,
    told: Told,
    unfinished: Path,
    team: Team | None = None,
    count: Callable[[int], int | Tensor] = lambda step: 1,
) -> list[float]:
    """AdamW with a short warm-up and a cosine down to zero; goes on where it was broken off.

    Args:
        groups: parameters with their highest learning rates.
        loss: of a step, the mean over this process's rows.
        stage: how many steps.
        scale: warm-up and longest gradient.
        told: hears of the steps that are done.
        unfinished: the file in which weights and moments are kept, now and then and when a signal asks for the end.
        team: the processes; just this one by default.
        count: over how much the mean of a step is taken, by which processes are weighed.

    Returns:
        The mean loss of every `OFTEN` steps.

    Raises:
        AnchorsError: the loss is not finite; the file cannot be read.
        Interrupted: a signal asked for the end; says which step is kept.
    """
    groups = [(parameters, lr) for parameters, lr in groups if lr > 0]
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": lr} for own, lr in groups], betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    parameters = {str(i): p for i, p in enumerate(p for own, _ in groups for p in own)}
    device = parameters["0"].device
    team = team or Team(device)
    state = State(unfinished, parameters, optimizer, "build elsewhere with another --seed")
    warmup, seen = max(1, round(scale.warmup * stage.steps)), []

    def sums(step: int) -> Float[Tensor, "2"]:
        with arithmetic(device):
            mean = loss(step)
        asked = torch.as_tensor(count(step), device=device).to(mean)
        return torch.stack([mean * asked, asked])

    def rates(step: int) -> list[float]:
        share = min((step + 1) / warmup, (1 + math.cos(math.pi * step / stage.steps)) / 2)
        return [lr * share for _, lr in groups]

    def keep(now: int, unseen: list[Tensor]) -> None:
        if team.main and now < stage.steps:
            state.save(now, [*torch.tensor(np.concatenate([*seen, np.zeros((0, 3))])).float(), *unseen])

    take_steps(
        state,
        sums,
        lambda own, total: own[0] / total[1],
        rates,
        steps=stage.steps,
        clip=scale.clip,
        team=team,
        start=state.restore(),
        due=lambda now: now % OFTEN == 0,
        look=lambda now, values, speed: seen.append(values),
        save=KEPT,
        keep=keep,
        told=told,
        kept="step {} of {} of this stage is kept, and all stages before",
    )
    found = np.concatenate(seen)
    return [float(np.divide(*found[i : i + OFTEN, :2].sum(0))) for i in range(0, len(found), OFTEN)]


def batches(pools: Sequence[Prompts], stage: Stage, seed: int, team: Team) -> Callable[[int], Prompts]:
    """From a step to this process's share of its rows: about `stage.items` items in all, from one pool drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(pools), (stage.steps,), generator=generator).tolist()
    device = pools[0].ids.device
    counts = [max(1, stage.items // pool.items) for pool in pools]
    rows = [
        torch.randint(len(pool), (stage.steps, count), generator=generator)[:, team.share(count)].to(device)
        for pool, count in zip(pools, counts, strict=True)
    ]
    return lambda step: pools[which[step]].take(rows[which[step]][step])


def answer_logits(
    model: PreTrainedModel, prompts: Prompts, features: Float[Tensor, "pictures patches width"] | None = None
) -> Float[Tensor, "rows targets vocabulary"]:
    """Logits where answers are to be written. With features of the vision tower, of a LLaVA; else of a language model.

    Rows are padded on the right, where no token sees it, so there is no mask.
    """
    if features is None:
        hidden = model.model(input_ids=prompts.ids, use_cache=False).last_hidden_state
    else:
        inner = model.model
        embedded = inner.language_model.embed_tokens(prompts.ids)
        seen = inner.multi_modal_projector(features[prompts.pictures.flatten()]).to(embedded.dtype)
        place = (prompts.ids == model.config.image_token_index)[..., None]
        embedded = embedded.masked_scatter(place, seen)
        hidden = inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    where = prompts.positions[..., None].expand(-1, -1, hidden.shape[-1])
    return model.lm_head(hidden.gather(1, where))


def answer_loss(
    model: PreTrainedModel, prompts: Prompts, features: Float[Tensor, "pictures patches width"] | None = None
) -> Float[Tensor, ""]:
    """Mean -log p over the tokens of answers and their ends."""
    logits = answer_logits(model, prompts, features)
    return F.cross_entropy(logits.flatten(0, 1).float(), prompts.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def right(
    model: PreTrainedModel,
    prompts: Prompts,
    features: Float[Tensor, "pictures patches width"] | None = None,
    batch: int = 100,
) -> Bool[Tensor, " rows"]:
    """Whether a model would write the whole answer of each row, greedily: the argmax is right at every target."""
    found = []
    for start in range(0, len(prompts), batch):
        own = prompts.take(slice(start, start + batch))
        with arithmetic(own.ids.device):
            best = answer_logits(model, own, features).argmax(-1)
        found.append(((best == own.targets) | (own.targets == IGNORED)).all(-1))
    return torch.cat(found)


def pixel_values(pixels: Tensor) -> Float[Tensor, "pictures 3 size size"]:
    """Bytes to [-1, 1], as the saved image processor does it."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def patches(tower: nn.Module, pixels: Tensor) -> Float[Tensor, "pictures patches width"]:
    """What the projector is given of each picture."""
    return tower(pixel_values(pixels), output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def all_patches(tower: nn.Module, pictures: Pictures, device: torch.device) -> Tensor:
    """The patches of all pictures. The vision tower is not trained after its own stage, so once is enough."""
    pixels = torch.from_numpy(pictures.pixels)
    with arithmetic(device):
        return torch.cat([patches(tower, part.to(device)).float() for part in pixels.split(500)])


class Classifier(nn.Module):
    """A linear reading of the mean patch for each of a scene's facts."""

    def __init__(self, width: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, seen: Float[Tensor, "pictures patches width"]) -> list[Tensor]:
        return [head(seen.mean(1)) for head in self.heads]


def facts_of(pictures: Pictures) -> tuple[Int[Tensor, "pictures 3"], list[int]]:
    """Number, shape and colour of each scene as classes, and how many classes each has."""
    columns = [[getattr(scene, name) for scene in pictures.scenes] for name in ("number", "shape", "colour")]
    orders = [sorted(set(column), key=str) for column in columns]
    classes = [[order.index(x) for x in column] for column, order in zip(columns, orders, strict=True)]
    return torch.tensor(classes).T, [len(order) for order in orders]
