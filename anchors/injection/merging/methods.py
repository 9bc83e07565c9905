"""The merging methods: each a pure function of the task vectors of one tensor.

A method has two steps: *prepare* changes τ_v and τ_e into A_v and A_e without knowing λ (drops entries, takes common
directions out), and *combine* makes one change Δ of them, m = b + Δ. A sweep over λ repeats only the second step.

| method           | prepare                                      | combine                                              |
|------------------|----------------------------------------------|------------------------------------------------------|
| average          | nothing; needs no base                       | m = (1 − λ_e)·v + λ_e·e, a = 1 − λ_e                 |
| swap             | nothing; needs no base                       | m = e                                                |
| task-arithmetic  | nothing                                      | λ_v·τ_v + λ_e·τ_e                                    |
| dare             | random entries dropped, the rest rescaled    | the same sum                                         |
| magnitude        | smallest entries dropped                     | the same sum                                         |
| breadcrumbs      | smallest and largest entries dropped         | the same sum                                         |
| della            | random entries dropped, small ones more often| the same sum                                         |
| ties             | smallest entries of both dropped             | sign elected, mean of those who have it              |
| dare-ties        | random entries of both dropped               | as ties                                              |
| della-ties       | the same, small ones more often              | as ties                                              |
| sce              | nothing                                      | most different entries, weighed by size, sign elected|
| tsv-m            | half of the singular directions, whitened    | the same sum                                         |
| iso-c, iso-cts   | nothing                                      | one singular value for all directions                |
| wudi             | nothing                                      | least interference on the inputs of either           |

The two weights. λ_v and λ_e weigh the two task vectors before they meet: with λ_v = 1 the VLM stays as it is and the
expert comes on top (papers on injection), with λ_v = λ_e both are experts of the base (papers on merging; their one
factor after merging is the same as λ_v = λ_e, but where stated). Dare, magnitude, breadcrumbs and della drop entries
of the expert only (`drop=expert`), so that λ_e = 0 is the VLM, or of both (`drop=both`), as mergekit and peft do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from anchors.errors import AnchorsError, nearest
from anchors.injection.merging import sign, sparse, spectral
from anchors.injection.merging.sign import both, weighted_sum

Parameters = Mapping[str, Any]
Prepare = Callable[[Tensor, Tensor, Parameters, Generator], tuple[Tensor, Tensor]]
"""(τ_v, τ_e, parameters, random numbers) to (A_v, A_e); A_v is the very τ_v where it is left alone."""
Combine = Callable[[Tensor, Tensor, float, float, Parameters], Tensor]
"""(A_v, A_e, λ_v, λ_e, parameters) to Δ."""


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Attributes:
        name: as in recipes.
        source: whose it is, and whose the defaults are.
        prepare: first step.
        combine: second step.
        defaults: density and options.
        choices: values that an option of text may have.
        strength: λ_e by default.
        blend: interpolates from v to e, without b and without λ_v.
        linear_only: for matrices of linear layers; every other tensor (and embedding and head, whose rows are tokens)
            gets λ_v·τ_v + λ_e·τ_e, times `rest`.
        rest: see `linear_only`; ½ is the mean, as published for TSV-M and Iso-C. WUDI's own code leaves all that at the
            base, which would undo the VLM's training there: the sum is ours.
        random: depends on the seed.
    """

    name: str
    source: str
    prepare: Prepare = both
    combine: Combine = weighted_sum
    defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strength: float = 1.0
    blend: bool = False
    linear_only: bool = False
    rest: float = 1.0
    random: bool = False

    def __call__(
        self,
        tau_v: Tensor,
        tau_e: Tensor,
        vlm_strength: float,
        strength: float,
        parameters: Parameters,
        generator: Generator,
    ) -> Tensor:
        """Δ = m − b of one tensor."""
        prepared = self.prepare(tau_v, tau_e, parameters, generator)
        return self.combine(*prepared, vlm_strength, strength, parameters)

    def check(self, parameters: Parameters, strengths: tuple[float, ...], vlm_strength: float) -> None:
        """Refuse what the method cannot do.

        Raises:
            AnchorsError: an option out of its range, or a λ that would be ignored.
        """
        for name, default in self.defaults.items():
            value = parameters[name]
            if name in self.choices:
                if value not in self.choices[name]:
                    raise AnchorsError(
                        f"{self.name} has no {name} {value!r}.",
                        nearest(value, self.choices[name]),
                        code="unknown-name",
                    )
            elif isinstance(value, bool) or not isinstance(
                value, int if isinstance(default, int) else (int, float)
            ):
                raise AnchorsError(
                    f"{name} of {self.name} is {value!r}; it must be a number like {default}.",
                    code="merge-recipe",
                )
            elif not 0 <= value < math.inf:
                raise AnchorsError(
                    f"{name} of {self.name} is {value}; it must be at least 0.", code="merge-recipe"
                )
        if "epsilon" in parameters and 0 < (d := parameters["density"]) < 1:
            epsilon = parameters["epsilon"]
            if d - epsilon <= 0 or d + epsilon >= 1:
                raise AnchorsError(
                    f"With density {d:g} and epsilon {epsilon:g} {self.name} would keep entries with probabilities "
                    f"from {d - epsilon:.3g} to {d + epsilon:.3g}.",
                    "They must lie between 0 and 1: take a smaller epsilon.",
                    code="merge-recipe",
                )
        if vlm_strength != 1 and (self.blend or parameters.get("convention") == "paper"):
            raise AnchorsError(
                f"{self.name} has one strength only; vlm_strength {vlm_strength:g} would be ignored.",
                "Leave it at 1, or take another convention, such as peft."
                if not self.blend
                else "Leave it at 1.",
                code="merge-recipe",
            )
        if self.name == "swap" and not set(strengths) <= {0, 1}:
            raise AnchorsError(
                "swap takes the expert's tensors whole.",
                "For a part of them take average.",
                code="merge-recipe",
            )


DROP = ("expert", "both")
RESCALE = ("density", "l1", "none")
CONVENTIONS = ("paper", "peft", "mergekit", "sum")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "average",
            "Wortsman et al. 2022; a = 0.9 as in Chen et al. 2025 (2505.05464), every run but InternVL's",
            strength=0.1,
            blend=True,
        ),
        Method("swap", "the expert's tower behind the VLM's eyes; by layers: Chen et al. 2025", blend=True),
        Method(
            "task-arithmetic", "Ilharco et al. 2023 (2212.04089); λ = 1 as in MergeLM, FusionBench has 0.3"
        ),
        Method(
            "dare",
            "Yu et al. 2024 (2311.03099); density as in FusionBench, the paper goes down to 0.1",
            prepare=sparse.pruned(sparse.dare),
            defaults={"density": 0.5, "rescale": "density", "drop": "expert"},
            choices={"rescale": RESCALE, "drop": DROP},
            random=True,
        ),
        Method(
            "dare-ties",
            "Yu et al. 2024 on Yadav et al. 2023; density as for dare",
            prepare=sparse.pruned(sparse.dare),
            combine=sign.elected,
            defaults={"density": 0.5, "rescale": "density", "drop": "both", "convention": "paper"},
            choices={"rescale": RESCALE, "drop": ("both",), "convention": CONVENTIONS},
            random=True,
        ),
        Method(
            "magnitude",
            "magnitude_prune of peft; the default density is ours",
            prepare=sparse.pruned(sparse.trim),
            defaults={"density": 0.5, "drop": "expert"},
            choices={"drop": DROP},
        ),
        Method(
            "ties",
            "Yadav et al. 2023 (2306.01708), with its k = 20%",
            prepare=sparse.pruned(sparse.trim),
            combine=sign.elected,
            defaults={"density": 0.2, "drop": "both", "convention": "paper"},
            choices={"drop": ("both",), "convention": CONVENTIONS},
        ),
        Method(
            "della",
            "Deep et al. 2024 (2406.11617), its first step MagPrune (mergekit's della_linear); its repository's example: drop 0.3, window 2ε = 0.14",
            prepare=sparse.pruned(sparse.della),
            defaults={"density": 0.7, "epsilon": 0.07, "rescale": "density", "drop": "expert"},
            choices={"rescale": RESCALE, "drop": DROP},
            random=True,
        ),
        Method(
            "della-ties",
            "Deep et al. 2024 (2406.11617), all three steps: drop, elect, fuse (mergekit's della); defaults as for della",
            prepare=sparse.pruned(sparse.della),
            combine=sign.elected,
            defaults={
                "density": 0.7,
                "epsilon": 0.07,
                "rescale": "density",
                "drop": "both",
                "convention": "paper",
            },
            choices={"rescale": RESCALE, "drop": ("both",), "convention": CONVENTIONS},
            random=True,
        ),
        Method(
            "breadcrumbs",
            "Davari and Belilovsky 2024 (2312.06795); density and gamma as in mergekit",
            prepare=sparse.pruned(sparse.breadcrumbs),
            defaults={"density": 0.9, "gamma": 0.01, "drop": "expert"},
            choices={"drop": DROP},
        ),
        Method(
            "sce",
            "Wan et al. 2024 (2408.07990), with its τ = 10%",
            combine=sign.sce,
            defaults={"density": 0.1, "floor": 0.0},
        ),
        Method(
            "tsv-m",
            "Gargiulo et al. 2025 (2412.00081)",
            prepare=spectral.tsv,
            linear_only=True,
            rest=0.5,
        ),
        Method(
            "iso-c",
            "Marczak et al. 2025 (2502.04959)",
            combine=spectral.iso_c,
            linear_only=True,
            rest=0.5,
        ),
        Method(
            "iso-cts",
            "Marczak et al. 2025 (2502.04959), with its common share of 80%",
            combine=spectral.iso_cts,
            defaults={"common": 0.8},
            linear_only=True,
            rest=0.5,
        ),
        Method(
            "wudi",
            "Cheng et al. 2025 (2503.08099), with its Adam, 1e-5, 300 iterations",
            combine=spectral.wudi,
            defaults={"iterations": 300, "lr": 1e-5},
            linear_only=True,
        ),
    )
}
"""By name."""
