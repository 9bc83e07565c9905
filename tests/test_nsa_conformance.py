"""Our equations against the naive functions of fla-core, which know the case l = d = l' with mean pooling."""

import pytest
import torch
from test_nsa_reference import drawn

from anchors.nsa import reference
from anchors.nsa.geometry import Geometry

ONE = Geometry(l=16, d=16, lp=16, n=5, w=24)


@pytest.fixture(scope="module")
def naive():
    """Imported by who runs it: it takes seconds."""
    return pytest.importorskip("fla.ops.nsa.naive", reason="fla-core is not installed (development group)")


@pytest.fixture(
    scope="module", params=[(16, 1), (12, 3), (4, 4)], ids=["one-group", "three-groups", "no-groups"]
)
def inputs(request):
    heads, groups = request.param
    return drawn(tokens=176, heads=heads, groups=groups, dim=8, dim_v=12, geometry=ONE, dtype=torch.float32)


def test_compressed_attention(inputs, naive):
    q, kv, _ = inputs
    o, lse = reference.compressed_attention(q, kv.kc, kv.vc, l=16, d=16, scale=0.3)
    theirs, their_lse = naive.naive_nsa_compression(q, kv.kc, kv.vc, 16, 0.3)
    torch.testing.assert_close(o, theirs)
    torch.testing.assert_close(lse, their_lse)


def test_chosen_blocks(inputs, naive):
    q, kv, _ = inputs
    _, lse = reference.compressed_attention(q, kv.kc, kv.vc, l=16, d=16, scale=0.3)
    idx = reference.select_blocks(q, kv.kc, lse, geometry=ONE, tokens=176, scale=0.3)
    theirs = naive.naive_nsa_topk(q, kv.kc, 5, 16, 0.3)
    known = theirs.where(theirs >= 0, 99).sort(-1).values
    assert torch.equal(idx.long().where(idx >= 0, 99), known)
    assert (idx[:, -1] >= 0).all()


def test_selected_attention(inputs, naive):
    q, kv, _ = inputs
    _, lse = reference.compressed_attention(q, kv.kc, kv.vc, l=16, d=16, scale=0.3)
    idx = reference.select_blocks(q, kv.kc, lse, geometry=ONE, tokens=176, scale=0.3)
    o, _ = reference.selected_attention(q, kv.k_slc, kv.v_slc, idx, lp=16, scale=0.3)
    theirs = naive.naive_nsa_selection(q, kv.k_slc, kv.v_slc, idx.long(), 16, 0.3)
    torch.testing.assert_close(o, theirs)
