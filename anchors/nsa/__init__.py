"""Native Sparse Attention (Yuan et al., ACL 2025): equations, kernels, a module, a language model, and a look inside.

    from anchors.nsa import Geometry, NSAConfig, NSAForCausalLM

    model = NSAForCausalLM(NSAConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, l=8, d=4, lp=16, n=6, w=32))

Rooms: the equations and the module here, `kernels`, and behind the verbs of `anchors nsa`: `training`, `probing`, `speed`. Names are
imported on first use: the equations and kernels do without transformers.
"""

import lazy_loader

from anchors._names import forwarding

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = forwarding(__name__, _lazy)
