"""Which rows of three embeddings (and heads) are the same token.

Vision-language models add tokens (`<image>`), pad their embeddings, or come with another tokenizer than the expert: rows
of equal number need not be rows of one token. What is not proved to be the same token in all three models stays as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from anchors.errors import AnchorsError, nearest

Policy = Literal["keep", "shared-rows", "by-token"]
POLICIES: tuple[Policy, ...] = ("keep", "shared-rows", "by-token")
Vocabulary = Mapping[str, int]
"""A tokenizer's `get_vocab()`: token strings to row numbers."""


@dataclass(frozen=True)
class SharedRows:
    """Rows that are merged, in the order of the vision-language model; all of its other rows stay.

    Attributes:
        vlm: rows of the vision-language model, each at most once, ascending.
        base: rows of the same tokens in the base.
        expert: rows of the same tokens in the expert.
    """

    vlm: Int64[Tensor, " n"]
    base: Int64[Tensor, " n"]
    expert: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.vlm)

    def merge(
        self,
        b: Float[Tensor, "rows_b *d"],
        v: Float[Tensor, "rows_v *d"],
        e: Float[Tensor, "rows_e *d"],
        merged: Callable[[Tensor, Tensor, Tensor], Float[Tensor, "n *d"]],
    ) -> Float[Tensor, "rows_v *d"]:
        """A copy of `v` whose shared rows are `merged(b, v, e)` of those rows alone, cast to the type of `v`."""
        result = v.clone()
        result[_run(self.vlm)] = merged(b[_run(self.base)], v[_run(self.vlm)], e[_run(self.expert)]).to(
            v.dtype
        )
        return result


def _run(rows: Int64[Tensor, " n"]) -> slice | Int64[Tensor, " n"]:
    """Rows that follow one another as a slice, which takes no copy of a large table."""
    first = int(rows[0]) if len(rows) else 0
    return (
        slice(first, first + len(rows)) if torch.equal(rows, torch.arange(first, first + len(rows))) else rows
    )


def align(
    policy: str,
    rows: tuple[int, int, int],
    vocabularies: tuple[Vocabulary, ...] | None = None,
) -> SharedRows | None:
    """The rows of embedding and head that a policy merges; None for `keep`.

    - `keep`: the vision-language model's embedding and head stay as they are.
    - `shared-rows`: rows of equal number that are the same token in all three, for tokenizers that only differ in what
      comes after. Rows of no token (padding) stay. Without vocabularies nothing is proved: the first rows, as many as all
      three have, for callers who know that they are the same tokens (merges from disk demand the tokenizers).
    - `by-token`: rows of the same token string, wherever they are.

    Args:
        policy: one of `POLICIES`.
        rows: rows of the embeddings of vision-language model, base and expert.
        vocabularies: of the same three; `by-token` needs them.

    Raises:
        AnchorsError: no such policy; `shared-rows` on tokenizers that call a shared row different tokens; `by-token`
            without vocabularies; no row is shared.
    """
    if policy not in POLICIES:
        raise AnchorsError(
            f"There is no embedding policy {policy!r}.", nearest(policy, POLICIES), code="unknown-name"
        )
    if policy == "keep":
        return None
    if policy == "shared-rows":
        shared = _same_numbers(rows, vocabularies)
    elif vocabularies is None:
        raise AnchorsError(
            "The embedding policy by-token needs the tokenizers of all three models, and one has none.",
            "Put the tokenizer's files beside the model, or take --embeddings keep.",
            code="tokenizer",
        )
    else:
        shared = _same_strings(rows, vocabularies)
    if not shared:
        raise AnchorsError(
            "The three tokenizers share no token.", "Take --embeddings keep.", code="tokenizer"
        )
    return SharedRows(*(torch.tensor(column, dtype=torch.int64) for column in zip(*shared, strict=True)))


def _same_numbers(
    rows: tuple[int, int, int], vocabularies: tuple[Vocabulary, ...] | None
) -> list[tuple[int, int, int]]:
    first = range(min(rows))
    if vocabularies is None:
        return [(i, i, i) for i in first]
    tokens = [_by_row(vocabulary) for vocabulary in vocabularies]
    named = {i: [own[i] for own in tokens if i in own] for i in first}
    different = {i: names for i, names in named.items() if len(set(names)) > 1}
    if different:
        i, names = next(iter(different.items()))
        raise AnchorsError(
            f"The tokenizers differ in {len(different)} of the first {len(first)} rows: row {i} is "
            f"{' and '.join(repr(name) for name in dict.fromkeys(names))}.",
            "Take --embeddings by-token, which aligns rows by token string, or keep.",
            code="tokenizer",
        )
    # A row that only some tokenizers use is new there, and padding in the others.
    return [(i, i, i) for i, names in named.items() if len(names) == 3]


def _same_strings(
    rows: tuple[int, int, int], vocabularies: tuple[Vocabulary, ...]
) -> list[tuple[int, int, int]]:
    _, base, expert = vocabularies
    return [
        (i, base[token], expert[token])
        for i, token in sorted(_by_row(vocabularies[0]).items())
        if i < rows[0] and base.get(token, rows[1]) < rows[1] and expert.get(token, rows[2]) < rows[2]
    ]


def _by_row(vocabulary: Vocabulary) -> dict[int, str]:
    """Token strings by row; of several names of one row, the first in alphabetical order."""
    return {row: token for token, row in sorted(vocabulary.items(), reverse=True)}
