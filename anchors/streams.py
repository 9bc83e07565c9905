"""Named streams of random numbers: what is drawn for one purpose never depends on what is drawn for another."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What is drawn. A number is never given to another purpose: finished runs rest on it."""

    QUERIES = 0
    DEMONSTRATIONS = 1
    CONTROL_POSITIONS = 2
    ISOLATED_POSITIONS = 3
    KEPT_TOKENS = 4
    TRAINING_EXAMPLES = 5
    TRAINING_ORDER = 6
    EXCHANGED_LABELS = 7
    ONE_SET = 8


def stream(purpose: Stream, seed: int, *keys: int) -> np.random.Generator:
    """The random numbers of a seed for one purpose; `keys` tell its parts apart (the number of a prompt, of a draw).

    A purpose has the same number of keys everywhere: NumPy takes [seed, 4] and [seed, 4, 0] for one seed.
    """
    return np.random.default_rng([seed, purpose, *keys])
