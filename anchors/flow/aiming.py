"""What a model makes of the tokens that a prompt aims at: how likely they are, and which would be likelier."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from anchors.flow.saliency import demand_finite
from anchors.model.language import LanguageModel
from anchors.tasks.aims import Likeliest, Place, otherwise
from anchors.tasks.prompts import Loss, Prompt


@torch.no_grad()
def likelihoods(model: LanguageModel, ids: Sequence[int]) -> Float[Tensor, " vocabulary"]:
    """Log probabilities of all tokens after a prompt, in double precision.

    Raises:
        AnchorsError: they are not numbers.
    """
    rows = torch.tensor([list(ids)], device=model.device)
    logits = model.logits_at(rows, torch.tensor([len(ids) - 1], device=model.device))[0]
    found = logits.cpu().double().log_softmax(-1)
    demand_finite(-found.max()[None])
    return found


def likeliest(model: LanguageModel) -> Likeliest:
    """What `anchors.tasks.aims.aimed` asks a model: the two likeliest tokens after a prompt."""
    return lambda ids: likelihoods(model, ids).topk(2).indices.tolist()


def named(model: LanguageModel, token: int) -> str:
    """A token as its text and its id."""
    return f"{model.tokenizer.decode([token])!r} (#{token})"


def aim_said(model: LanguageModel, aim: Loss, chances: Float[Tensor, " vocabulary"]) -> str:
    """What is differentiated where a prompt aims at a token, with its value.

    Args:
        model: whose tokens they are.
        aim: of the prompt.
        chances: log probabilities of what comes after it.
    """
    token, *others = (named(model, one) for one in aim.tokens)
    known = chances[list(aim.tokens)]
    if not others:
        return f"The flow is that of −log p of {token}, over the whole vocabulary; p = {100 * float(known[0].exp()):.3g} %."
    return f"The flow is that of the log-odds of {token} against {others[0]}: {float(known[0] - known[1]):+.3g} nats."


def spaced(model: LanguageModel, prompt: Prompt, place: Place, wanted: Sequence[str | None]) -> list[str]:
    """Of each text that was asked for, a note where the model finds it likelier with a space than without, or the other way.

    Args:
        model: asked.
        prompt: with its aim.
        place: where it ends.
        wanted: the target's text and what it stands against, see `anchors.tasks.aims.aimed`.
    """
    assert prompt.aim is not None  # noqa: S101 - made of these texts
    chances, notes = likelihoods(model, prompt.ids).exp(), []
    for text, token in zip((text for text in wanted if text is not None), prompt.aim.tokens, strict=True):
        other = otherwise(place, text, model.tokenizer)
        if other is not None and chances[other[1]] > chances[token]:
            notes.append(
                f"{named(model, token)} was taken for {text!r}; {other[0]!r} (#{other[1]}) is likelier here: "
                f"{100 * float(chances[other[1]]):.3g} % beside {100 * float(chances[token]):.3g} %."
            )
    return notes
