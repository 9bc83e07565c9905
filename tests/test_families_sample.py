"""A sample of `benchmarks/families.py`: the hardest kinds of families, a few numbers each, against their own eager attention."""

import ast
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from sweep import family, images, prompts, tiny
from sweep.facts import EVERY

from anchors.model.loading import without_gpu_kernels

EXACT = {
    "mistral+window-16": ("logits", "maps", "sums"),
    "deepseek_v3": ("maps", "compression"),
    "bart": ("logits", "maps", "shared"),
    "gemma3n_text+kv-shared": ("shared", "isolation"),
    "llama4_text+chunk-16": ("maps", "readout"),
    "granitemoehybrid+attention": ("re-weighting", "compression"),
    "doge": ("maps", "sums"),
    "gpt_oss": ("isolation", "patching"),
    "longcat_flash": ("patching",),
    "whisper": ("logits", "shared"),
    "bloom": ("maps", "re-weighting"),
    "falcon+new": ("compression",),
    "inkling_text": ("maps",),
    "dots3_note_text+heads": ("isolation",),
    "qwen3_next": ("isolation", "readout"),
    "jamba": ("isolation",),
}
"""Latent keys and values, learned positions that go unheard, shared keys and values, chunks, no positions at all, a mask
with a gradient, sinks, windows that hide label words, two attentions in a decoder layer, a forward that hands on what it
does not know, a bias on keys, one made of what is seen, attention in a method of its own, heads and their sizes by layer."""
REFUSED = ("mamba", "rwkv", "git", "musicgen")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("families")
    prompts.write(folder)
    return folder, *prompts.read(folder)


def swept(asked, name: str, numbers: tuple[str, ...], evidence: bool) -> list[family.Row]:
    folder, edge, size, groups = asked
    with without_gpu_kernels():
        return family.sweep(name, folder, size, edge, groups, numbers, evidence)


@pytest.mark.parametrize("name", EXACT)
def test_numbers_are_those_of_the_untouched_model(asked, name):
    rows = swept(asked, name, EXACT[name], evidence=False)
    assert [row.number for row in rows] == ["certificate", *EXACT[name]]
    assert [row for row in rows if row.verdict != "exact"] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_shows_its_cause(asked, name):
    rows = swept(asked, name, ("logits",), evidence=True)
    assert [row.verdict for row in rows] == ["refused", "refused"]
    assert all(row.shown for row in rows)


def test_several_streams_are_shown_where_patching_is_refused(asked):
    """One of them exchanged leaves the other prompt away; so do all of them, where layers are handed the tokens besides."""
    _, row = swept(asked, "gemma3n_text", ("patching",), evidence=True)
    assert row.verdict == "refused"
    assert "several residual streams" in row.reason
    assert "2 residual streams enter model.layers.0 side by side" in row.shown
    assert "with all streams before model.layers.0 exchanged" in row.shown


@pytest.mark.parametrize(
    ("name", "cause"), [("blip-2", None), ("instructblip", "another text for its Q-Former")]
)
def test_image_features_made_of_the_text_are_shown(asked, name, cause):
    _, edge, size, groups = asked
    model = tiny.build_seeing(name, size + 8, edge)
    shown = images.seen(model, groups[-1].prompts[0], model.config.image_token_id)
    _, _, found = images.maps(model.requires_grad_(True), shown)
    facts = [fact.text for fact in images.facts(model, shown, found)]
    assert len(facts) == (cause is not None)
    assert all(text.startswith(cause) for text in facts)


def test_prompts_stand_on_both_sides_of_the_edge(asked):
    _, edge, _, groups = asked
    short, long = groups[0].prompts, groups[-1].prompts
    assert max(len(p.ids) for p in short) < edge
    assert all(p.query < edge < len(p.ids) for p in long)


def test_another_number_is_called_wrong():
    right = {"short": torch.eye(3)}

    class Off:
        def numbers(self):
            return {"maps": lambda: {"short": torch.eye(3) * 1.02}}

    row = family.judged("llama", "maps", right, Off(), "float32", [])
    assert row.verdict == "wrong"
    assert row.error == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("module", ["oracle", "right", "facts", "tiny"])
def test_the_right_values_use_nothing_of_the_toolkit(module):
    tree = ast.parse((BENCHMARKS / "sweep" / f"{module}.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not {name for name in names if name and name.partition(".")[0] == "anchors"}
    assert {name for name in names if name.startswith("sweep.")} <= {
        f"sweep.{own}" for own in ("oracle", "right", "facts", "tiny")
    }


def test_every_number_of_the_sweep_is_in_the_sample():
    assert {number for numbers in EXACT.values() for number in numbers} | {"padded"} == set(EVERY)
