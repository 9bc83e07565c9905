"""The saliency of NSA layers by the kernel against the tiles of the equations: each branch, all together, and the flow.

Without a GPU it runs in Triton's interpreter, in a process of its own; see `test_interpreted`.
"""

import copy
import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from gpu import needs_cuda, needs_interpreter, needs_triton
from nsa_probing import EPISODES, folder, lm, prompt  # noqa: F401 - fixtures
from test_nsa_model import model

from anchors.attention.seam import route, seam
from anchors.flow.saliency import FlowTap
from anchors.model.language import load
from anchors.nsa.attention import BRANCHES
from anchors.nsa.call import NSACall
from anchors.nsa.probing.probe import geometry_of, probe_prompt

NAMES = (*BRANCHES, "all")


class Tap:
    """A tap of every branch that takes what it is given: sums where `summing`, tiles else."""

    by_branch = True

    def __init__(self, layers, wanted, maps=()):
        self.layers, self.wanted, self.maps = frozenset(range(layers)), wanted, frozenset(maps)
        self.kinds = {name: FlowTap(self.layers, wanted, self.maps) for name in NAMES}
        self.shown = set()

    def begin(self, call, z, dz):
        for kind in self.kinds.values():
            kind.begin(call, z, dz)

    def branches(self, call, rows, by_branch):
        index = torch.arange(rows.start, rows.stop, device=call.q.device)
        for name, product in by_branch.items():
            self.kinds[name].tile(call, index, slice(0, product.shape[-1]), product)

    def tile(self, call, rows, keys, product):
        self.shown.add("tiles")
        self.kinds["all"].tile(call, rows, keys, product)


class Sums(Tap):
    def summed(self, call, dz, found):
        self.shown.add("sums")
        for name, kind in self.kinds.items():
            if name in found:
                kind.summed(call, dz, {"all": found[name]})


def seen(lm, ids, tap):
    modules = route(lm)
    with seam(modules, taps=[tap]):
        lm(ids, use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
    lm.zero_grad()
    return tap


def other(lm, backend):
    """The same weights by another backend."""
    twin = copy.deepcopy(lm)
    twin.config.backend = backend
    return twin


def close(found, wanted, allowed, what):
    size = wanted.abs().max()
    error = float((found.double() - wanted.double()).abs().max() / size)
    assert error <= allowed, f"{what} is off by {error:.1e}"


class Calls(Tap):
    """Keeps what each layer's products are made of."""

    def __init__(self, layers, wanted, maps=()):
        super().__init__(layers, wanted, maps)
        self.given = {}

    def begin(self, call, z, dz):
        super().begin(call, z, dz)
        self.given[call.layer] = call, z, dz


def wide(call):
    """The same call in float64, with the blocks that were chosen."""
    twin = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    vars(twin)["idx"] = call.idx
    return twin


def agree(lm, ids, allowed, by_branch=True):
    """Sums of the kernel against the tiles in float64 of the same numbers, in every layer; the last has one row with a slope."""
    tokens, layers = ids.shape[1], lm.config.num_hidden_layers
    wanted = torch.tensor([[0, tokens - 1, -1, tokens // 2, 11]], device=ids.device).expand(len(ids), -1)
    calls, asking = seen(lm, ids, Calls(layers, wanted)), Sums(layers, wanted, range(layers))
    asking.by_branch = by_branch
    twin = Tap(layers, wanted, range(layers))
    for layer, (call, z, dz) in calls.given.items():
        found = call.sums(z, dz, asking)
        again = (
            call.sums(z, dz, asking) if ids.is_cuda else found
        )  # the interpreter runs one program after the other
        wide(call)._show([twin], z.double(), dz.double())
        assert list(found) == (list(NAMES) if by_branch else ["all"])
        for name, own in found.items():
            exact = twin.kinds[name]
            for mine, other_run, value in (
                (own.rows, again[name].rows, exact.rows[layer]),
                (own.total, again[name].total, exact.total[layer]),
                *([(own.full, again[name].full, exact.full[layer])] if name == "all" else []),
            ):
                assert mine.shape == value.shape
                assert torch.equal(mine, other_run), "two runs differ"
                if value.any():
                    close(mine, value, allowed, f"{name} in layer {layer}")
                else:  # a branch that sees nothing yet
                    assert not mine.any()
        worst, size = found["all"].error
        assert worst <= allowed * size
        close(size, twin.kinds["all"].error[layer][1], allowed, "⟨z, dz⟩")


def text(tokens, batch=1):
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(3))


CASES = {
    "mlp": ({"phi": "mlp"}, 45, 2),
    "linear, in blocks of one stride": ({"phi": "linear", "l": 8, "d": 8}, 64, 1),
    "mean, in four compressed tokens": (
        {"phi": "mean", "l": 16, "d": 4, "lp": 48, "n": 3, "n_init": 0, "compressed_rope": "none"}, 110, 1,
    ),
    "three heads a group": (
        {"num_attention_heads": 6, "head_dim": 8, "value_head_dim": 20, "compressed_rope": "inner"}, 50, 1,
    ),
    "no compressed token": ({"w": 5}, 7, 2),
    "large blocks": ({"lp": 64, "n": 2, "n_init": 1, "n_local": 1, "w": 3}, 150, 1),
}  # fmt: skip


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_every_branch_is_that_of_the_tiles_interpreted(case):
    options, tokens, batch = CASES[case]
    agree(model(torch.float32, **options), text(tokens, batch), 1e-5)


@needs_triton
@needs_interpreter
def test_the_flow_alone_interpreted():
    agree(model(torch.float32), text(60), 1e-5, by_branch=False)


@needs_triton
@needs_interpreter
def test_flow_taps_take_sums_interpreted(monkeypatch):
    """No tile is formed where every listener is content with sums, and all are where one is not."""
    monkeypatch.setattr(NSACall, "products", lambda *args: pytest.fail("a tile was formed"))
    twin, ids = other(model(torch.float32), "triton"), text(24)
    wanted = torch.tensor([[23]])
    seen(twin, ids, FlowTap(frozenset([0, 1]), wanted))
    modules = route(twin)
    taps = [FlowTap(frozenset([0, 1]), wanted), Tap(2, wanted)]
    with pytest.raises(pytest.fail.Exception, match="a tile"), seam(modules, taps=taps):
        twin(ids).logits[:, -1].logsumexp(-1).sum().backward()


def call_of(lm, ids):
    """The only layer's call, and its gradient."""
    tap = seen(lm, ids, Calls(1, torch.tensor([[ids.shape[1] - 1]], device=ids.device)))
    call, _, dz = tap.given[0]
    return call, dz


@needs_triton
@needs_interpreter
def test_the_sign_of_the_flow_interpreted():
    from anchors.nsa.kernels.saliency import saliency

    tokens = 60
    call, dz = call_of(model(torch.float32, num_hidden_layers=1), text(tokens))
    s, dz = call.sparse, torch.randn_like(dz)
    exact = wide(call).products(slice(0, tokens), dz.double())
    every = torch.arange(tokens)[None]
    found = saliency(
        call.q.transpose(1, 2), s.kv, call._parts(), s.gates, dz.transpose(1, 2), call.idx, s.geometry,
        scale=call.scale, wanted=every, by_branch=True, full=True, signed=True,
    )  # fmt: skip
    for name, rows in found.rows.items():
        product = reduce(torch.add, exact.values()) if name == "all" else exact[name]
        signed = product.sum(1)
        signed.diagonal(dim1=1, dim2=2).zero_()
        close(rows, signed, 1e-5, name)
        close(found.totals[name], signed.abs().sum((1, 2)), 1e-5, name)
    assert torch.equal(found.full, found.rows["all"])
    assert (found.full < 0).any()
    close(found.head_sums, sum(exact.values()).sum(-1), 1e-5, "the sums by head")


@needs_triton
@needs_interpreter
def test_memory_is_linear_interpreted(monkeypatch):
    """Nothing that the kernel's own memory holds has as many numbers as there are pairs of tokens."""
    from anchors.nsa.kernels import saliency as kernel

    monkeypatch.setattr(kernel, "TILES", {(4, 128): ((16, 16, 4, 1, 0),)})
    monkeypatch.setattr(kernel, "splits_of", lambda keys, tile: 1)
    tokens, sizes = 400, []
    call, dz = call_of(model(torch.float32, num_hidden_layers=1), text(tokens))
    s, dz = call.sparse, torch.randn_like(dz)
    dz[:, :, 64:] = 0  # the interpreter is slow; blocks of rows without a slope are passed over
    for name in ("new_empty", "new_zeros"):
        made = getattr(torch.Tensor, name)

        def counted(x, *size, made=made, **options):
            sizes.append(math.prod(size if isinstance(size[0], int) else size[0]))
            return made(x, *size, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    found = kernel.saliency(
        call.q.transpose(1, 2), s.kv, call._parts(), s.gates, dz.transpose(1, 2), call.idx, s.geometry,
        scale=call.scale, wanted=torch.tensor([[63, 399]]), by_branch=True,
    )  # fmt: skip
    assert found.full is None
    assert max(sizes) <= 32 * tokens < tokens**2 // 8
    assert found.rows["all"][:, 0].any()
    assert not found.rows["all"][:, 1].any()


@needs_triton
@needs_interpreter
def test_a_probe_by_the_kernel_is_that_by_tiles_interpreted(lm, prompt, monkeypatch):
    """Every measure of a prompt, by branch and layer; the rest of the model by the equations."""
    routed = load(copy.deepcopy(lm.model).float(), tokenizer=lm.tokenizer, device="cpu", precision="float32")
    found = []
    for kernels in (False, True):
        monkeypatch.setattr(NSACall, "_kernels_run", lambda call, kernels=kernels: kernels)
        measures, *_ = probe_prompt(
            routed, prompt, geometry_of(routed), np.random.default_rng(0), interventions=False
        )
        found.append({(m.metric, m.condition, m.layer, m.group, m.head, m.place): m.value for m in measures})
    tiles, sums = found
    assert sums.keys() == tiles.keys()
    assert len([key for key in sums if key[0] in ("s_wp", "s_pq", "s_ww")]) == 3 * 4 * 2
    assert sums != tiles, "the kernel was not asked"
    for key, value in tiles.items():
        assert key[0] == "identity_error" or sums[key] == pytest.approx(value, rel=1e-4, nan_ok=True), key


BIG = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64}
PAPER = {"l": 32, "d": 16, "lp": 64, "n": 6, "w": 128}
# Queries reach 25, so that a score has few digits behind the point: plain float32 is off by 5e-6 in the first case.
ON_CUDA = [
    pytest.param({**BIG, **PAPER}, 1000, 2, torch.float32, 1e-4, id="float32"),
    pytest.param({**BIG, **PAPER, "head_dim": 128, "phi": "linear"}, 1000, 1, torch.bfloat16, 3e-2, id="bfloat16"),
    pytest.param({**BIG, **PAPER, "head_dim": 192, "value_head_dim": 128}, 700, 1, torch.bfloat16, 3e-2, id="wide"),
    pytest.param({"l": 16, "d": 4, "lp": 48, "n": 3, "n_init": 0}, 300, 2, torch.float32, 2e-5, id="odd"),
]  # fmt: skip


@needs_triton
@needs_cuda
@pytest.mark.parametrize(("options", "tokens", "batch", "dtype", "allowed"), ON_CUDA)
def test_every_branch_is_that_of_the_tiles_on_cuda(options, tokens, batch, dtype, allowed):
    lm = model(torch.float32, **options).to("cuda", dtype)
    agree(lm, text(tokens, batch).cuda(), allowed)
    agree(lm, text(tokens, batch).cuda(), allowed, by_branch=False)


@needs_triton
@needs_cuda
def test_memory_and_waits_on_cuda():
    """Of 16k tokens the kernel needs less than a quarter of one float32 map, and it waits for the card nowhere."""
    from anchors.nsa.kernels.saliency import saliency

    sizes = BIG | PAPER | {"num_hidden_layers": 1, "phi": "mean"}
    call, dz = call_of(model(torch.float32, **sizes).to("cuda", torch.bfloat16), text(16384).cuda())
    s, wanted = call.sparse, torch.tensor([[16383]], device="cuda")
    dz = torch.randn_like(dz).transpose(1, 2)
    given = call.q.transpose(1, 2), s.kv, call._parts().to(call.q.dtype), s.gates, dz, call.idx, s.geometry
    saliency(*given, scale=call.scale, wanted=wanted)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = saliency(*given, scale=call.scale, wanted=wanted, by_branch=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 16384**2 * 4 * 0.25, f"{peak / 1e6:.0f} MB"
    assert found.totals["all"].isfinite().all()
