"""Model configs are read by the command line and name networks that can be built."""

import contextlib
import io
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from lightning_modules import SFTModule
from temper.models import LoRASpec, NetworkSpec, ShapeSpec
from temper.models.blocks import checkpoint_activations
from temper.models.folder import HUB_NAME
from temper.models.lora import add_lora

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
# Shapes of models that are on a hub, as their config.json has them: what a test can know without
# one.
SHAPES = {
    "llama2_7b": LlamaConfig(),
    "llama3_8b": LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    "qwen2_7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "gemma2_9b": Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
}
BILLIONS = {
    "llama2_7b": 6.74,
    "llama3_8b": 8.03,
    "qwen2_7b": 7.62,
    "gemma2_9b": 9.24,
}  # with the output layer, as published


def _read(config: Path, command_line) -> dict:
    """What the command line makes of a config."""
    out = io.StringIO()
    words = (
        "--config=configs/trainer/cpu.yaml",
        "--config=configs/objective/sft.yaml",
        f"--config={config}",
        "--config=configs/data/instruct.yaml",
    )
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        command_line("fit", *words, "--print_config")
    assert left.value.code in (0, None)
    return yaml.safe_load(out.getvalue())["model"]["init_args"]


def _spec(network: dict) -> NetworkSpec:
    lora = network.pop("lora")
    shape = network.pop("shape")
    return NetworkSpec(
        **network,
        lora=LoRASpec(**lora) if lora else None,
        shape=ShapeSpec(**shape) if shape else None,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_model_config_makes_a_module(config, command_line):
    arguments = _read(config, command_line)
    spec = _spec(arguments["network"])
    module = SFTModule(spec, micro_batch_size=arguments["micro_batch_size"])
    assert module.network_spec == spec
    assert (spec.shape is None) != (spec.path is None)
    if spec.path is not None and not spec.path.startswith("models/"):
        assert (
            HUB_NAME.fullmatch(spec.path) and not spec.local_files_only and spec.dtype == "bfloat16"
        )
    assert not spec.trust_remote_code


@pytest.mark.parametrize("name", SHAPES)
def test_the_adapter_of_a_config_fits_the_network_it_names(name, command_line):
    spec = _spec(_read(ROOT / "configs" / "model" / f"{name}.yaml", command_line)["network"])
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(SHAPES[name], attn_implementation=spec.attention)
        assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(
            BILLIONS[name], abs=0.01
        )
        adapted = add_lora(network, spec.lora)
    checkpoint_activations(adapted)
    layers = SHAPES[name].num_hidden_layers
    assert (
        sum(p.requires_grad for p in adapted.parameters()) == 2 * 3 * layers
    )  # A and B of q, k and v


def test_every_model_of_the_project_has_a_config():
    wanted = {
        "tiny",
        "smollm2_135m",
        "gemma3_270m",
        "llama2_7b",
        "llama3_8b",
        "qwen2_7b",
        "gemma2_9b",
    }
    assert wanted <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("folder", ["smollm2_135m", "gemma3_270m"])
def test_models_of_the_registry_are_where_make_puts_them(folder):
    path = (
        ROOT
        / yaml.safe_load((ROOT / "configs" / "model" / f"{folder}.yaml").read_text())["model"][
            "init_args"
        ]["network"]["path"]
    )
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not there: make {folder.split('_')[0]}")
    assert AutoConfig.from_pretrained(path).model_type in ("llama", "gemma3_text")
