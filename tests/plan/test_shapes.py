"""Shapes of networks, and the sources of their configurations."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec
from temper.models.lora import add_lora
from temper.plan.shapes import adapter_weights, find_architecture
from tests.plan.shapes import published, small_config, small_shape

# As published, with the output layer.
BILLIONS = {
    "meta-llama/Llama-2-7b-hf": 6.738,
    "meta-llama/Llama-2-13b-hf": 13.016,
    "meta-llama/Meta-Llama-3-8B": 8.030,
    "Qwen/Qwen2-7B": 7.616,
    "google/gemma-2-9b": 9.242,
    "HuggingFaceTB/SmolLM2-135M": 0.1345,
    "google/gemma-3-270m": 0.2681,
}


@pytest.mark.parametrize("path", BILLIONS)
def test_published_shapes_have_as_many_parameters_as_published(path: str):
    shape = published(path)
    assert shape.parameters / 1e9 == pytest.approx(BILLIONS[path], rel=5e-4)
    assert "published numbers" in shape.source


def test_linear_layers_norms_and_layer_indices_are_found():
    shape = small_shape(num_key_value_heads=2)
    places = {linear.name.rsplit(".", 1)[-1]: linear.place for linear in shape.linears}
    assert places == {
        "q_proj": "attention_in",
        "k_proj": "attention_in",
        "v_proj": "attention_in",
        "o_proj": "attention_out",
        "gate_proj": "mlp_in",
        "up_proj": "mlp_in",
        "down_proj": "mlp_out",
        "lm_head": "head",
    }
    assert (
        shape.norms,
        shape.capped,
        small_shape("gemma2").norms,
        small_shape("gemma2").capped,
    ) == (2, False, 4, True)
    assert {weight.layer for weight in shape.weights} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["c_attn"]], ids=str)
def test_an_adapter_is_the_one_that_peft_makes(kind: str, targets: str | list[str]):
    lora = LoRASpec(rank=4, targets=targets)  # type: ignore[arg-type]
    if isinstance(targets, list) and (kind == "gpt2") != (targets == ["c_attn"]):
        with pytest.raises(TemperError, match="no linear layer .*choose from"):
            adapter_weights(small_shape(kind), lora)
        return
    with torch.device("meta"):
        network = add_lora(AutoModelForCausalLM.from_config(small_config(kind)), lora)
    made = sorted(tuple(p.shape) for p in network.parameters() if p.requires_grad)
    assert (
        sorted((w.rows, w.size // w.rows) for w in adapter_weights(small_shape(kind), lora)) == made
    )


def test_a_folder_comes_before_the_table_of_shapes(tmp_path: Path):
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    small_config(hidden_size=64).save_pretrained(base)
    adapter.mkdir()
    settings = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert find_architecture(NetworkSpec(path=str(base))).config.hidden_size == 64
    found = find_architecture(NetworkSpec(path=str(adapter)))
    assert found.config.hidden_size == 64 and found.adapter == LoRASpec(3, 6, ["q_proj"])
    assert find_architecture(NetworkSpec(path=str(adapter), adapter="merge")).adapter is None


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (NetworkSpec(), "neither of path and shape"),
        (NetworkSpec(path="x", shape=ShapeSpec()), "both of path and shape"),
        (NetworkSpec(path="nobody/nothing"), "none in the hub's cache"),
        (NetworkSpec(shape=ShapeSpec()), "size of the vocabulary"),
        (NetworkSpec(shape=ShapeSpec(hidden_size=10, n_heads=3)), "n_heads=3 does not divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_architecture_is_an_error(spec: NetworkSpec, found: str):
    with pytest.raises(TemperError, match=found):
        find_architecture(spec, None if "vocabulary" in found else 100)
