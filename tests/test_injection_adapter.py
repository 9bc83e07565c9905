"""A LoRA folder is the expert that peft's own forward pass makes of its base, or is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from injection_families import Saved, saved
from injection_merging import same, weights
from injection_suites import build, tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from anchors.cli.inject import app
from anchors.errors import AnchorsError
from anchors.injection.asking.suite import Suite
from anchors.injection.asking.vlm import load_vlm
from anchors.injection.merging.adapter import Adapted, open_expert
from anchors.injection.merging.checkpoint import SINGLE, Checkpoint
from anchors.injection.merging.memory import inject
from anchors.injection.merging.merge import merge
from anchors.injection.merging.recipe import Recipe
from anchors.injection.suites import SuiteModels

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """An adapter: the family whose language model it is trained on, and peft's options."""

    options: dict[str, Any]
    family: str = "llava"
    seen: tuple[str, ...] = field(default=())


KINDS = {
    "plain": Kind({"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "rslora": Kind({"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": Kind(
        {
            "r": 4, "lora_alpha": 6, "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"layers.2.self_attn.v_proj": 16, "q_proj": 5},
        }
    ),
    "dora": Kind({"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    "turned in vain": Kind({"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "whole modules": Kind(
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}
    ),
    "biases": Kind({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "bias": "all"}, "internvl"),
    "biases of factors": Kind(
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}, "internvl"
    ),
    "embedding and head": Kind(
        {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}, "llava", ("lm_head.weight",)
    ),
    "tied embedding": Kind(
        {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "k_proj"]}, "smolvlm", ("lm_head.weight",)
    ),
    "tied head": Kind(
        {"r": 2, "lora_alpha": 6, "target_modules": ["lm_head", "k_proj"]}, "smolvlm", ("lm_head.weight",)
    ),
    "layers of a mixture": Kind({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}, "qwen3_vl_moe"),
}  # fmt: skip


@torch.no_grad()
def trained(kind: Kind, folder: Path) -> torch.Tensor:
    """Write an adapter whose tensors are all random, and give what peft answers with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(saved(kind.family).base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **kind.options)).eval()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                scale = 0.05 if "magnitude" in name else 0.2
                weight.add_(scale * torch.randn_like(weight))
        answers = model(input_ids=torch.arange(4, 40)[None]).logits
        model.save_pretrained(folder)
    return answers


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_an_adapter_answers_as_in_pefts_forward_pass(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    wanted = trained(kind, tmp_path / "lora")
    base = Checkpoint.open(saved(kind.family).base)
    expert = open_expert(tmp_path / "lora", base)
    assert isinstance(expert, Adapted)
    model = AutoModelForCausalLM.from_pretrained(saved(kind.family).base)
    plain = model(input_ids=torch.arange(4, 40)[None]).logits
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert set(kind.seen) <= set(expert.shapes)
    names = dict(model.named_parameters())
    changed = set()
    for own in expert.shapes:
        if ".experts." not in own:
            if not torch.equal(names[own], expert.weight(own)):
                changed.add(own)
            names[own].copy_(expert.weight(own))
    if "lm_head.weight" not in expert.shapes:
        model.lm_head.weight.copy_(expert.weight("model.embed_tokens.weight"))
    assert changed
    torch.testing.assert_close(
        model(input_ids=torch.arange(4, 40)[None]).logits, wanted, rtol=1e-4, atol=1e-4
    )
    assert (plain - wanted).abs().max() > 0.01
    assert expert.fingerprint not in (base.fingerprint, expert.lora.fingerprint)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained(KINDS["plain"], folder)
    return folder


@pytest.fixture
def lora(once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(once, tmp_path / "lora")


@pytest.fixture
def own() -> Saved:
    return saved("llava")


def test_a_merge_adds_the_low_rank_product(lora: Path, own: Saved, tmp_path: Path) -> None:
    report = merge(own.vlm, lora, own.base, Recipe(strength=0.7), tmp_path / "out")
    v, m, low = weights(own.vlm), weights(tmp_path / "out"), load_file(lora / "adapter_model.safetensors")
    for name, tensor in v.items():
        module = "base_model.model.model." + name.removeprefix("language_model.model.").removesuffix(
            ".weight"
        )
        if f"{module}.lora_A.weight" in low:
            delta = 0.7 * (6 / 4) * (low[f"{module}.lora_B.weight"] @ low[f"{module}.lora_A.weight"])
            torch.testing.assert_close(m[name], tensor + delta, rtol=0, atol=1e-6)
        else:
            assert torch.equal(m[name], tensor)
    assert report.changed == 3 * len(LINEAR)
    assert report.notes == ()
    facts = json.loads((tmp_path / "out" / "injection.json").read_text())
    assert facts["models"]["expert"]["name"] == str(lora)
    # The same call again knows the adapter, another adapter is another merge.
    again = merge(own.vlm, lora, own.base, Recipe(strength=0.7), tmp_path / "out")
    assert again.notes[-1].startswith("Nothing left to compute")
    low = {name: 1.1 * tensor for name, tensor in low.items()}
    save_file(low, lora / "adapter_model.safetensors")
    with pytest.raises(AnchorsError, match="another configuration"):
        merge(own.vlm, lora, own.base, Recipe(strength=0.7), tmp_path / "out")


def test_experts_one_by_one_take_adapters_of_single_experts(tmp_path: Path) -> None:
    """As transformers 4 trained them: names are those of the checkpoint, the tower has them stacked."""
    own, key = saved("qwen3_vl_moe"), "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    torch.manual_seed(0)
    a, b = torch.randn(2, 16), 0.1 * torch.randn(12, 2)
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(own.base)}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merge(own.vlm, tmp_path / "lora", None, Recipe(strength=0.5), tmp_path / "out")
    v, m = weights(own.vlm), weights(tmp_path / "out")
    stack = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    wanted = v[stack].clone()
    wanted[2, 12:] += b @ a
    torch.testing.assert_close(m[stack], wanted, rtol=0, atol=1e-6)
    assert same({n: t for n, t in m.items() if n != stack}, {n: t for n, t in v.items() if n != stack})


def test_which_base_an_adapter_is_put_on(lora: Path, own: Saved, tmp_path: Path) -> None:
    recipe = Recipe(strength=0.7)
    merge(own.vlm, lora, own.base, recipe, tmp_path / "given")
    merge(own.vlm, lora, None, recipe, tmp_path / "named")  # adapter_config.json names a folder
    path = lora / "adapter_config.json"
    path.write_text(path.read_text().replace(str(own.base), "someone/somewhere"))
    report = merge(own.vlm, lora, own.base, recipe, tmp_path / "elsewhere")
    assert f"names 'someone/somewhere' as its base; it was put on {str(own.base)!r}" in report.notes[0]
    with pytest.raises(
        AnchorsError, match="belongs to 'someone/somewhere', which is no folder here"
    ) as error:
        merge(own.vlm, lora, None, recipe, tmp_path / "nowhere")
    assert error.value.code == "adapter"
    for folder in (own.base.glob("*"), lora.glob("adapter_*")):
        for file in folder:
            (tmp_path / "both").mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / "both")
    merge(
        own.vlm, tmp_path / "both", own.base, recipe, tmp_path / "beside"
    )  # a whole model and an adapter on it
    given = weights(tmp_path / "given")
    assert all(same(given, weights(tmp_path / name)) for name in ("named", "elsewhere", "beside"))
    with pytest.raises(AnchorsError, match="holds an adapter"):
        merge(own.vlm, own.expert, tmp_path / "both", recipe, tmp_path / "no")
    with pytest.raises(AnchorsError, match="is no adapter"):
        merge(own.vlm, own.expert, None, recipe, tmp_path / "no")
    # Another model that is there is what the adapter belongs to, whatever the base of the merge is.
    path.write_text(path.read_text().replace("someone/somewhere", str(own.expert)))
    found, base = open_expert(lora, own.base), Checkpoint.open(own.base)
    name = "model.norm.weight"
    assert torch.equal(found.weight(name), Checkpoint.open(own.expert).weight(name))
    assert not torch.equal(found.weight(name), base.weight(name))


def test_a_head_of_its_own_is_not_merged_into_a_tied_one(tmp_path: Path) -> None:
    own = saved("smolvlm")
    for kind in ("tied embedding", "tied head"):
        trained(KINDS[kind], tmp_path / kind)
        report = merge(own.vlm, tmp_path / kind, own.base, Recipe(strength=0.7), tmp_path / f"{kind}-out")
        assert report.changed == 3  # keys of three layers; embedding and head are kept
        with pytest.raises(AnchorsError, match="has a head of its own"):
            merge(own.vlm, tmp_path / kind, own.base, Recipe(embeddings="shared-rows"), tmp_path / "no")


@pytest.mark.parametrize(
    ("name", "changed"), [("embedding and head", "embed_tokens"), ("tied head", "lm_head")]
)
def test_what_keep_leaves_out_is_said(name: str, changed: str, tmp_path: Path) -> None:
    family = saved(KINDS[name].family)
    trained(KINDS[name], tmp_path / "lora")
    out = tmp_path / "merged"
    report = merge(family.vlm, tmp_path / "lora", family.base, Recipe(), out)
    assert any(changed in note and "leaves out" in note for note in report.notes)
    options = {**KINDS[name].options, "target_modules": ["lm_head"]}
    trained(Kind(options, KINDS[name].family), tmp_path / "only")
    with pytest.raises(AnchorsError, match="nothing of it would be merged"):
        merge(family.vlm, tmp_path / "only", family.base, Recipe(), tmp_path / "none")


def test_from_the_command_line_without_a_base(lora: Path, own: Saved, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, [str(own.vlm), str(lora), "--strength", "0.7", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    merge(own.vlm, lora, own.base, Recipe(strength=0.7), tmp_path / "again")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "again"))
    done = CliRunner().invoke(app, [str(own.vlm), str(own.expert), "--out", str(tmp_path / "no")])
    assert done.exit_code != 0
    assert "--base must be given" in done.output
    for more in ("--inspect", "--dry-run"):
        assert CliRunner().invoke(app, [str(own.vlm), str(lora), more]).exit_code == 0


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def held(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return write


_KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (configured(peft_type="LOHA"), "is of the kind LOHA"),
        (configured(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters = "),
        (configured(trainable_token_indices=[1]), "trainable_token_indices = "),
        (configured(layer_replication=[[0, 2]]), "layer_replication = "),
        (configured(something_new=True), "something_new = True"),
        (configured(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (configured(use_dora=True), "says use_dora = True, but its tensors do not"),
        (configured(r=3), "has rank 4, its configuration says r = 3"),
        (configured(lora_alpha=None), "lora_alpha = None"),
        (held(lambda t: t.pop(f"{_KEY}.lora_B.weight")), "has one factor without the other"),
        (held(lambda t: t.update({f"{_KEY}.lora_C.weight": torch.ones(2)})), "does not have: .*lora_C"),
        (held(lambda t: t.update({"model.norm.weight": torch.ones(16)})), "not understood"),
        (held(lambda t: t.update({"base_model.model.score.weight": torch.ones(2)})), "does not have"),
        (held(lambda t: t.update({f"{_KEY}.lora_B.weight": torch.ones(8, 4)})), "makes 8×16 of .*16×16"),
        (held(lambda t: t.clear()), "changes nothing"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    spoil: Callable[[Path], None], says: str, lora: Path, own: Saved, tmp_path: Path
) -> None:
    spoil(lora)
    with pytest.raises(AnchorsError, match=says) as error:
        merge(own.vlm, lora, own.base, Recipe(), tmp_path / "out")
    assert error.value.code == "adapter"
    assert error.value.remedy
    assert not (tmp_path / "out").exists()
    assert SINGLE not in {path.name for path in lora.iterdir()}


@torch.no_grad()
def test_a_suites_expert_may_be_an_adapter(tmp_path: Path) -> None:
    """The text is answered by peft's layers, the pictures by the merged tower: one expert."""
    suite = Suite.open(build(tmp_path))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"])
    )
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        weight.add_(0.2 * torch.randn_like(weight))
    folder = tmp_path / "experts" / "instruction"
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    vlm = load_vlm(suite.model("vlm"), device="cpu", precision="float32")
    world = SuiteModels(suite, None, vlm)
    expert = world.language_model("experts", "instruction")
    ids = torch.tensor([[2, 3, 7, 9]])
    torch.testing.assert_close(expert.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    vectors = world.task_vectors(expert, "instruction")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with inject(vlm.model, vectors, "swap", embeddings="shared-rows"):
        seen = vlm.model(input_ids=ids).logits
    torch.testing.assert_close(seen, expert.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (seen - plain(input_ids=ids).logits).abs().max() > 0.01
