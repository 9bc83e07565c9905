"""Native Sparse Attention (Yuan et al., ACL 2025): equations, kernels, a module, a language model, and a look inside.

    from anchors.nsa import Geometry, NSAConfig, NSAForCausalLM

    model = NSAForCausalLM(NSAConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, l=8, d=4, lp=16, n=6, w=32))

`anchors.nsa.train.train`, `anchors.nsa.bench.bench` and `anchors.nsa.probe` stand behind the verbs of `anchors nsa`. Names
are imported on first use: the equations and kernels do without transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchors.nsa.attention import Branches, Trace, nsa_attention, trace
    from anchors.nsa.call import Intervention, NSACall
    from anchors.nsa.config import NSAConfig
    from anchors.nsa.episodes import Episodes
    from anchors.nsa.geometry import Geometry
    from anchors.nsa.kernels.decode import NSACache, captured, nsa_decode
    from anchors.nsa.model import NativeSparseAttention, NSAForCausalLM
    from anchors.nsa.phi import MLP, LinearPool, MeanPool
    from anchors.nsa.probe import Probe
    from anchors.nsa.reference import compress
    from anchors.nsa.train import Recipe, Watch

_HOMES = {
    "attention": ("Branches", "Trace", "nsa_attention", "trace"),
    "call": ("Intervention", "NSACall"),
    "config": ("NSAConfig",),
    "episodes": ("Episodes",),
    "geometry": ("Geometry",),
    "kernels.decode": ("NSACache", "captured", "nsa_decode"),
    "model": ("NSAForCausalLM", "NativeSparseAttention"),
    "phi": ("MLP", "LinearPool", "MeanPool"),
    "probe": ("Probe",),
    "reference": ("compress",),
    "train": ("Recipe", "Watch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MLP",
    "Branches",
    "Episodes",
    "Geometry",
    "Intervention",
    "LinearPool",
    "MeanPool",
    "NSACache",
    "NSACall",
    "NSAConfig",
    "NSAForCausalLM",
    "NativeSparseAttention",
    "Probe",
    "Recipe",
    "Trace",
    "Watch",
    "captured",
    "compress",
    "nsa_attention",
    "nsa_decode",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'anchors.nsa' has no attribute {name!r}")
    return getattr(import_module(f"anchors.nsa.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
