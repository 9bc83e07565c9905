"""The same numbers by the toolkit, through the calls that its users make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sweep.right import EPOCHS, ISOLATED, RULES, Asked, columns

Numbers = dict[str, Tensor]


class Toolkit:
    """A model as the toolkit loads it, and its numbers by name.

    The certificate that stands before every run is asked first; what it refuses, every number refuses.
    """

    def __init__(self, source: Any, folder: Path, precision: str) -> None:
        import anchors
        from anchors.check import check
        from anchors.errors import CertificateError
        from sweep.prompts import SHOTS, few

        tokenizer = None
        if not isinstance(source, Path):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lm = anchors.load(
            str(source) if isinstance(source, Path) else source,
            tokenizer=tokenizer,
            device="cpu",
            precision=precision,
        )
        self.task = anchors.task("sst2")
        self.data = {shots: few(shots) for shots in SHOTS}
        self.prompts = {
            shots: [
                d.prompt
                for d in anchors.draw(
                    self.task, data, self.lm.tokenizer, anchors.Draw(shots=shots, fresh=False), 2
                )
            ]
            for shots, data in self.data.items()
        }
        self.ends = [self.prompts[shots][0] for shots in (SHOTS[0], SHOTS[-1])]
        if failed := [f for f in check(self.lm, self.ends, [], quick=True) if f.ok is False]:
            raise CertificateError("; ".join(f"{f.name}: {f.detail}" for f in failed))

    def numbers(self) -> dict[str, Callable[[], Numbers]]:
        return {
            "certificate": self.certificate, "logits": self.logits, "padded": self.padded, "maps": self.maps, "sums": self.sums,
            "shared": self.shared, "isolation": self.isolation, "readout": self.readout, "re-weighting": self.reweighting,
            "compression": self.compression, "patching": self.patching,
        }  # fmt: skip

    def certificate(self) -> Numbers:
        """All of `anchors check`: what it says, not what is right."""
        from anchors.check import check
        from anchors.errors import CertificateError

        if failed := [f for f in check(self.lm, self.ends, []) if f.ok is False]:
            raise CertificateError("; ".join(f"{f.name}: {f.detail}" for f in failed))
        return {}

    @torch.no_grad()
    def logits(self) -> Numbers:
        found = {}
        for name, prompt in zip(("short", "long"), self.ends, strict=True):
            asked = Asked(prompt.ids, prompt.label_positions, (), (), 0, prompt.query, ())
            ids = torch.tensor([prompt.ids] * len(columns(asked)))
            found[name] = self.lm.logits_at(ids, torch.tensor(columns(asked)))
        return found

    @torch.no_grad()
    def padded(self) -> Numbers:
        from anchors.flow.saliency import collate

        batch = collate(self.ends)
        short, long = self.lm.logits_at(batch.ids, batch.target)
        return {"short": short, "long": long}

    def maps(self) -> Numbers:
        from anchors.flow import flow

        layers = self.lm.layers
        found = {}
        for name, prompt in zip(("short", "long"), self.ends, strict=True):
            own = flow(self.lm, [prompt], maps=layers).maps
            found[name] = torch.stack([own[layer][0] for layer in layers])
        return found

    def sums(self) -> Numbers:
        from anchors.flow import flow

        found = {}
        for name, prompts in (("alone", self.ends[:1]), ("batch", self.ends)):
            own = flow(self.lm, prompts).sums
            for row, length in enumerate(("short", "long")[: len(prompts)]):
                found[f"{length}/{name}"] = torch.stack([own.s_wp[row], own.s_pq[row], own.s_ww[row]])
        return found

    def _measured(self, analysis: Any):
        import anchors

        for shots, data in self.data.items():
            rows = anchors.measure(
                self.lm, analysis, self.task, data, anchors.Sample(shots=shots, examples=2)
            ).rows
            yield shots, rows[rows.number >= 0], rows[rows.number < 0]

    def _probabilities(self, rows, condition: str = "none") -> Tensor:
        rows = rows[rows.condition == condition]
        values = [
            rows[rows.metric == f"probability/{label}"].sort_values("number").value.to_numpy()
            for label in self.task.labels
        ]
        return torch.stack([torch.tensor(v) for v in values], dim=1)

    def shared(self) -> Numbers:
        import anchors

        return {
            str(shots): self._probabilities(rows)
            for shots, rows, _ in self._measured(anchors.Classification())
        }

    def isolation(self) -> Numbers:
        import anchors

        found, ends = {}, (self.lm.layers[0] + 1, self.lm.n_layers - self.lm.layers[-1])
        count = max(ISOLATED, *ends)  # as many as hold an attention at either end
        for shots, rows, _ in self._measured(anchors.Isolation(layers=(count,), positions=("label",))):
            for side in ("first", "last"):
                found[f"{shots}/{side}"] = self._probabilities(rows, f"{side}-{count}/label")
        return found

    def readout(self) -> Numbers:
        import anchors

        found = {}
        for shots, rows, _ in self._measured(anchors.Readout()):
            kept = [
                rows[rows.metric == f"attention/{label}"].sort_values(["number", "layer"])
                for label in self.task.labels
            ]
            found[str(shots)] = torch.stack(
                [torch.tensor(k.value.to_numpy()).view(2, -1) for k in kept], dim=2
            )
        return found

    def reweighting(self) -> Numbers:
        import anchors

        found = {}
        for shots, rows, seed in self._measured(anchors.Reweighting(epochs=EPOCHS, per_class=1, batch=2)):
            found[f"{shots}/probabilities"] = self._probabilities(rows, "reweighted")
            losses = seed[seed.metric == "training_loss"].sort_values("condition")
            found[f"{shots}/losses"] = torch.tensor(losses.value.to_numpy())
            beta = seed[seed.metric.str.startswith("beta/")]
            found[f"{shots}/beta"] = torch.tensor(beta.value.sort_values().to_numpy())
        return found

    def compression(self) -> Numbers:
        import anchors

        found = {}
        for rule in RULES:
            for shots, rows, _ in self._measured(anchors.Compression(methods=("hidden_anchor",), rule=rule)):
                found[f"{shots}/{rule}"] = self._probabilities(rows, "hidden_anchor")
        return found

    def patching(self) -> Numbers:
        import anchors

        layers = (self.lm.layers[0], self.lm.layers[len(self.lm.layers) // 2])
        found = {}
        for shots, rows, _ in self._measured(anchors.Causal(layers=layers, positions=("label",))):
            rows = rows[rows.number == 0]
            scale = float(rows[rows.metric == "follow_denominator"].value.iloc[0])
            found[f"{shots}/denominator"] = torch.tensor(scale)
            for n, layer in enumerate(layers):
                own = rows[(rows.condition == "label") & (rows.layer == layer)].set_index("metric").value
                found[f"{shots}/numerator/{n}"] = torch.tensor(float(own["follow_numerator"]))
                found[f"{shots}/shift/{n}"] = torch.tensor(float(own["shift"]))
        return found
