"""The tables of docs/cost.md: operations and bytes, from a model's shape alone.

uv run python docs/cost_table.py
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model in numbers.

    Attributes:
        n, D, I, V: layers, width, width of the MLP, vocabulary.
        H, K, d: query heads, heads of keys and values, their width.
        gated: whether the MLP has three matrices (SwiGLU) or two.
    """

    n: int
    D: int
    I: int
    V: int
    H: int
    K: int
    d: int
    gated: bool = True

    @property
    def P(self) -> int:
        """Weights that every token is multiplied with."""
        return (
            self.n * self.D * (2 * self.H * self.d + 2 * self.K * self.d + (3 if self.gated else 2) * self.I)
        )

    @property
    def cached(self) -> int:
        """Numbers of keys and values per token."""
        return 2 * self.n * self.K * self.d

    @property
    def saved(self) -> int:
        """Numbers per token that the backward pass reads."""
        mlp = (3 if self.gated else 1) * self.I
        return self.n * (2 * self.D + 2 * self.H * self.d + 2 * self.K * self.d + mlp)

    def forward(self, tokens: int, past: int = 0) -> float:
        """Operations of a forward pass with logits at the last token."""
        attention = 4 * self.n * self.H * self.d * tokens * (past + tokens)
        return 2 * self.P * tokens + 2 * self.V * self.D + attention

    def backward(self, tokens: int, pairs: float | None = None) -> float:
        """Operations of the flow's backward pass, whose tiles hold so many pairs: all in one tile, half of them in many."""
        pairs = tokens * tokens if pairs is None else pairs
        first = 2 * tokens * self.D * (self.H + 2 * self.K) * self.d
        # The first layer forms scores and A ⊙ ∂L/∂A alone; of the last one only the target's row has a gradient.
        attention = self.H * self.d * (10 * (self.n - 2) * pairs + 4 * pairs + 10 * tokens)
        return 2 * self.P * tokens + 2 * self.V * self.D - first + attention

    def flow(self, tokens: int) -> float:
        """Operations of the flow of one prompt, in many tiles."""
        return self.forward(tokens) + self.backward(tokens, tokens * tokens / 2)

    def crossover(self, pair: float = 9, weight: float = 4) -> float:
        """The length from which attention takes more operations than the products with weights do."""
        return weight * self.P / (pair * self.n * self.H * self.d)


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 49152, 9, 3, 64),
    "GPT2-XL": Shape(48, 1600, 6400, 50257, 25, 25, 64, gated=False),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 128256, 32, 8, 128),
}


LENGTHS = (256, 2048, 32768)


def main() -> None:
    print("| | P | keys and values | saved by the flow | attention is half of the flow from |")
    print("|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        kept = f"{shape.cached * 4 / 1024:,.0f} KiB | {shape.saved * 4 / 1024:,.0f} KiB"
        print(f"| {name} | {shape.P / 1e6:,.0f} M | {kept} | T = {shape.crossover():,.0f} |")
    print("\n| TFLOP of one prompt | " + " | ".join(f"T = {tokens:,}" for tokens in LENGTHS) + " |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for name, shape in SHAPES.items():
        for what, work in (("forward", shape.forward), ("flow", shape.flow)):
            print(
                f"| {name}, {what} | " + " | ".join(f"{work(tokens) / 1e12:.3g}" for tokens in LENGTHS) + " |"
            )


if __name__ == "__main__":
    main()
