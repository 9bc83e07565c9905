"""Where a test input stands behind tokens that were kept of its demonstrations."""

from typing import Literal, get_args

Rule = Literal["after-last-anchor", "restart", "original"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""Where the test input stands: after the last kept position (the reference for GPT-J), at 0 (the reference for
GPT2-XL), or where it stood in the whole prompt. `reference` is the reference's choice for a family like this one."""
