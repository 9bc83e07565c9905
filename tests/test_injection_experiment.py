"""The experiment of the tiny world: a skill that was learnt from texts, on pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from anchors.injection.asking.evaluate import evaluate
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import VisionLanguageModel, load_vlm
from anchors.injection.demo.build import Builder
from anchors.injection.demo.scales import TINY
from anchors.injection.demo.world import SKILLS
from anchors.injection.merging.memory import TaskVectors, inject


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny world: base, vlm, experts and suite."""
    folder = tmp_path_factory.mktemp("world")
    Builder(folder, TINY, seed=0, device=torch.device("cpu"), upper=False).build()
    return folder


@pytest.fixture(scope="module")
def suite(tiny: Path) -> Suite:
    return Suite.open(tiny / "suite")


@pytest.fixture(scope="module")
def vlm(tiny: Path) -> VisionLanguageModel:
    return load_vlm(tiny / "vlm", device="cpu")


@pytest.fixture(scope="module")
def vectors(tiny: Path, vlm: VisionLanguageModel) -> dict[str, TaskVectors]:
    base = AutoModelForCausalLM.from_pretrained(tiny / "base")
    experts = {s: AutoModelForCausalLM.from_pretrained(tiny / "experts" / s) for s in SKILLS}
    return {s: TaskVectors.of(vlm.model, base, expert) for s, expert in experts.items()}


@pytest.mark.whole
class TestExperiment:
    """What the demonstration is for: a skill from text, on pictures."""

    def test_the_parents(self, tiny: Path) -> None:
        """Experts have the skill on texts; the VLM sees, and has none."""
        vlm = json.loads((tiny / "vlm" / "stage.json").read_text())["seen"]
        assert vlm["vision"] > 0.95
        for skill in SKILLS:
            assert json.loads((tiny / "experts" / skill / "stage.json").read_text())["text"][skill] > 0.85
            assert vlm[skill] < 0.2

    def test_a_skill_is_injected(self, suite: Suite, vlm: VisionLanguageModel, vectors: dict) -> None:
        def share(scenario: str, image: str = "own") -> float:
            return float(evaluate(vlm, suite, suite.examples(scenario), image)["correct"].mean())

        lifted = []
        for skill in SKILLS:
            with inject(vlm.model, vectors[skill], "task-arithmetic", 1.0):
                seen, blind, vision = share(skill), share(skill, "blank"), share("vision")
            # Who cannot see can say the same digit every time.
            shown = [e.text for e in suite.examples(skill)]
            assert blind < max(map(shown.count, shown)) / len(shown) + 0.05
            if seen > 0.15 and vision > 0.9:
                lifted.append(skill)
        assert lifted

    def test_dare_without_rescaling_is_a_smaller_strength(
        self, suite: Suite, vlm: VisionLanguageModel, vectors: dict
    ) -> None:
        """What a published implementation did: dropping half without rescaling, λ = 1, is λ = ½ in disguise."""

        def share(**recipe: object) -> float:
            with inject(vlm.model, vectors["mathematics"], **recipe):
                return float(evaluate(vlm, suite, suite.examples("mathematics"))["correct"].mean())

        plain = {"method": "dare", "strength": 1.0, "density": 0.5}
        dropped = np.mean([share(**plain, seed=s, options=(("rescale", "none"),)) for s in range(3)])
        rescaled = np.mean([share(**plain, seed=s) for s in range(3)])
        half = share(method="task-arithmetic", strength=0.5)
        assert abs(dropped - half) < 0.05
        assert rescaled > half + 0.1
