"""A plan finds from the headers what is wrong with quantized weights, in the words of the loader."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_checkpoints import CONFIGS as CASES
from published_checkpoints import is_coded, publish
from repository import CONFIGS
from safetensors.torch import load_file, save_file
from tiny_checkpoints import MIXTRAL, PHIMOE, PHIXTRAL, write
from torch import Tensor

from moray.batch.plan.model_info import read_config, read_model_info
from moray.engine.checkpoint.families import FAMILIES
from moray.engine.checkpoint.model_config import parse_model_config, read_model_config
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.errors import CheckpointError
from moray.engine.models import ARCHITECTURES
from moray.engine.runner.loader import load_model

WORDS, ELEMENTS = "compressed-tensors-words-int4-group", "compressed-tensors-elements-int8-channel"
OTHERS = ["lm_head", "lm_head.linear", r"re:.*\.gate$"]
Q = "model.layers.1.self_attn.q_proj"
W2 = "model.layers.0.block_sparse_moe.experts.10.w2"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose widths the groups divide; Mixtral's has more than ten experts."""
    root = tmp_path_factory.mktemp("plain")
    wide = PHIMOE | {"intermediate_size": 64}, PHIXTRAL | {"n_embd": 64}
    many = MIXTRAL | {"intermediate_size": 64, "num_local_experts": 12}
    return {config["model_type"]: write(root / config["model_type"], config) for config in (*wide, many)}


def plan(folder: Path) -> None:
    source = ModelSource(str(folder))
    read_model_info(source, read_config(source), "auto")


def load(folder: Path) -> None:
    load_model(folder, read_model_config(folder), torch.float32)


def mistakes(folder: Path) -> list[str]:
    """Return what the plan and the loader say."""
    found = []
    for read in (plan, load):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("case", [WORDS, ELEMENTS, "gptq-int4"])
@pytest.mark.parametrize(
    ("left_out", "partner"), [(Q, "model.layers.1.self_attn.k_proj"), (W2, W2.replace("10.w2", "0.w1"))]
)
def test_weights_that_one_kernel_multiplies_are_quantized_alike(
    plain: dict[str, Path], tmp_path: Path, case: str, left_out: str, partner: str
) -> None:
    dynamic = {f"-:{re.escape(left_out)}": {}, r"-:.*\.gate": {}}
    changes = {"dynamic": dynamic} if case.startswith("gptq") else {"ignore": [*OTHERS, left_out]}
    published, _ = publish(
        plain["mixtral"],
        tmp_path,
        case,
        choose=lambda name, tensor: is_coded(name, tensor) and name != f"{left_out}.weight",
        **changes,
    )
    expected = f"{left_out}.weight is not quantized, but {partner} is, and one kernel multiplies both; use a "
    of_plan, of_loader = mistakes(published)
    assert of_plan == of_loader and of_plan.startswith(expected)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_weight_that_is_stored_as_floats(plain: dict[str, Path], tmp_path: Path) -> None:
    """The config says that it is quantized."""

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{Q}.")]:
            del tensors[name]
        tensors[f"{Q}.weight"] = torch.zeros(64, 64)

    published, _ = publish(plain["mixtral"], tmp_path / "words", WORDS)
    rewrite(published, widen)
    of_plan, of_loader = mistakes(published)
    assert of_plan == of_loader
    assert of_plan.splitlines()[1:] == [
        f"Missing: {Q}.weight_packed, {Q}.weight_scale, {Q}.weight_shape.",
        f"Not of this model: {Q}.weight.",
    ]
    published, _ = publish(plain["mixtral"], tmp_path / "elements", ELEMENTS)
    rewrite(published, widen)
    of_plan, of_loader = mistakes(published)
    assert of_plan == of_loader
    assert of_plan.splitlines()[1:] == [f"Missing: {Q}.weight_scale.", f"Of a dtype other than I8: {Q}.weight F32."]


def test_a_weight_that_is_stored_as_codes_of_another_kind(plain: dict[str, Path], tmp_path: Path) -> None:
    published, _ = publish(plain["mixtral"], tmp_path, ELEMENTS)
    rewrite(published, lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)}))
    of_plan, of_loader = mistakes(published)
    assert of_plan == of_loader
    assert of_plan.splitlines()[1:] == [f"Of a dtype other than I8: {Q}.weight F8_E4M3."]


def test_codes_of_what_the_config_leaves_out(plain: dict[str, Path], tmp_path: Path) -> None:
    whole = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    published, _ = publish(plain["mixtral"], tmp_path, WORDS, ignore=[*OTHERS, *whole])
    of_plan, of_loader = mistakes(published)
    assert of_plan == of_loader and f"Not of this model: {whole[1]}.weight_packed, " in of_plan


@pytest.mark.parametrize(
    ("architecture", "case"), [*(("phimoe", case) for case in CASES), ("phi-msft", WORDS), ("phi-msft", ELEMENTS)]
)
def test_a_plan_refuses_nothing_that_loads(
    plain: dict[str, Path], tmp_path: Path, architecture: str, case: str
) -> None:
    published, _ = publish(plain[architecture], tmp_path, case)
    one = next(
        name for name in load_file(published / "model.safetensors") if name.endswith("scale") or "scales" in name
    )
    module = one.rpartition(".")[0]
    rewrite(published, lambda tensors: tensors.update({f"{module}.input_scale": torch.ones(1)}))
    plan(published)
    load(published)


@pytest.mark.parametrize("name", ["phi-3.5-moe", "mixtral-8x7b", "phixtral-4x2_8"])
def test_the_names_that_a_plan_takes_together_are_those_of_the_models_layers(name: str) -> None:
    config = parse_model_config(json.loads((CONFIGS / name / "config.json").read_text()), {}, name)
    layers: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}
    for stored, target in ARCHITECTURES[config.architecture].tensor_map(config).items():
        module, _, part = stored.rpartition(".")
        if part == "weight" and len(target.shape) == 2:
            layers.setdefault(target.param.rpartition(".")[0], set()).add(module)
            for pattern in FAMILIES[config.architecture].names.multiplied_together:
                if found := re.fullmatch(pattern, module):
                    named.setdefault(f"{pattern} {found[1]}", set()).add(module)
    assert sorted(map(sorted, named.values())) == sorted(sorted(layer) for layer in layers.values() if len(layer) > 1)
