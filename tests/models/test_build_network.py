"""Networks from a shape or a folder: seeds, adapters, precision, and invalid settings."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network, export_network
from temper.synthetic import build_tokenizer, language_spec

TOKENIZER = build_tokenizer(language_spec("tiny"))
SHAPE = ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=24, max_length=32)
LORA = LoRASpec(rank=2, alpha=4.0, targets=["q_proj", "v_proj"])
IDS = torch.tensor([[1, 8, 9, 20, 4], [1, 7, 7, 21, 2]])


def _logits(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits


def _disturb_adapter(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give the adapter random weights: a new adapter, with B = 0, has no effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a network of random weights."""
    folder = tmp_path_factory.mktemp("base") / "export"
    export_network(
        build_network(NetworkSpec(shape=SHAPE), TOKENIZER), TOKENIZER, folder, merge=True
    )
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A folder with a LoRA adapter on `base`."""
    folder = tmp_path_factory.mktemp("adapter") / "export"
    network = _disturb_adapter(build_network(NetworkSpec(path=str(base), lora=LORA), TOKENIZER))
    export_network(network, TOKENIZER, folder, merge=False)
    return folder


def test_a_shape_has_given_sizes_and_the_data_vocabulary():
    network = build_network(NetworkSpec(shape=SHAPE), TOKENIZER)
    config = network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 1, 2)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (
        24,
        32,
        len(TOKENIZER),
    )
    assert _logits(network).shape == (2, 5, len(TOKENIZER))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert network.generation_config.pad_token_id == TOKENIZER.pad_token_id


def test_the_weights_of_a_shape_depend_on_its_seed_alone():
    torch.manual_seed(1)
    one = build_network(NetworkSpec(shape=SHAPE), TOKENIZER).state_dict()
    torch.manual_seed(2)
    torch.rand(5)
    two = build_network(NetworkSpec(shape=SHAPE), TOKENIZER).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_network(
        NetworkSpec(shape=ShapeSpec(**{**vars(SHAPE), "seed": 1})), TOKENIZER
    ).state_dict()
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].std() > 0)


def test_building_from_a_shape_keeps_the_random_state():
    before = torch.random.get_rng_state()
    build_network(NetworkSpec(shape=SHAPE), TOKENIZER)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_an_adapter_every_weight_is_trained(base, dtype):
    for spec in (NetworkSpec(shape=SHAPE, dtype=dtype), NetworkSpec(path=str(base), dtype=dtype)):
        parameters = list(build_network(spec, TOKENIZER).parameters())
        assert all(parameter.requires_grad for parameter in parameters)
        assert {parameter.dtype for parameter in parameters} == {getattr(torch, dtype)}


@pytest.mark.parametrize("source", ["shape", "path"])
def test_only_the_adapter_is_trained_in_fp32_on_a_bf16_base(source, base):
    where = {"shape": SHAPE} if source == "shape" else {"path": str(base)}
    network = build_network(NetworkSpec(**where, lora=LORA, dtype="bfloat16"), TOKENIZER)
    trained = {
        name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    frozen = {
        name: parameter
        for name, parameter in network.named_parameters()
        if not parameter.requires_grad
    }
    assert len(trained) == 4  # A and B of two layers
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert not any("lora_" in name for name in frozen)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    assert {min(parameter.shape) for parameter in trained.values()} == {LORA.rank}


def test_a_new_adapter_changes_no_output(base):
    plain, adapted = (
        build_network(NetworkSpec(path=str(base), lora=lora), TOKENIZER) for lora in (None, LORA)
    )
    assert torch.equal(_logits(plain), _logits(adapted))


def test_a_continued_adapter_is_the_stored_one_trained_in_fp32(base, adapter):
    network = build_network(NetworkSpec(path=str(adapter), dtype="bfloat16"), TOKENIZER)
    assert isinstance(network, PeftModel)
    trained = [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    assert len(trained) == 4
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained)
    assert network.generation_config.pad_token_id == TOKENIZER.pad_token_id
    exact = build_network(NetworkSpec(path=str(adapter)), TOKENIZER)
    plain = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    assert not torch.allclose(_logits(exact), _logits(plain), atol=1e-2)


def test_a_merged_adapter_equals_the_continued_one_to_1e_5(adapter):
    continued = build_network(NetworkSpec(path=str(adapter)), TOKENIZER)
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    assert not isinstance(merged, PeftModel)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(_logits(merged), _logits(continued), rtol=0, atol=1e-5)


def test_after_merging_an_adapter_all_weights_are_trained(adapter):
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_new_adapter_on_a_merged_one_starts_from_its_outputs(adapter):
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    fresh = build_network(NetworkSpec(path=str(adapter), adapter="merge", lora=LORA), TOKENIZER)
    assert torch.allclose(_logits(fresh), _logits(merged), rtol=0, atol=1e-6)
    assert sum(parameter.requires_grad for parameter in fresh.parameters()) == 4
    assert all(
        "lora_" in name for name, parameter in fresh.named_parameters() if parameter.requires_grad
    )


# -- refusals


def _refused(
    spec: NetworkSpec, message: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER
) -> None:
    with pytest.raises(TemperError, match=message) as caught:
        build_network(spec, tokenizer)
    assert "\n" not in str(caught.value)


def test_neither_path_nor_shape_is_refused():
    _refused(
        NetworkSpec(),
        r"model\.init_args\.network: neither of path and shape given; set exactly one, for"
        r" example --",
    )


def test_both_path_and_shape_are_refused(base):
    _refused(
        NetworkSpec(path=str(base), shape=SHAPE),
        r"network: both of path and shape given; set exactly one",
    )


def test_a_missing_folder_is_refused(tmp_path):
    _refused(
        NetworkSpec(path=str(tmp_path / "nowhere")),
        r"network\.path=.*nowhere: no such folder; give a folder with config\.json",
    )


def test_a_folder_without_a_network_is_refused(tmp_path):
    _refused(
        NetworkSpec(path=str(tmp_path)),
        r"network\.path=.*: neither config\.json nor adapter_config\.json in it; give a run's"
        r" export/",
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    _refused(
        NetworkSpec(path=str(tmp_path)),
        r"no tokenizer\.json in it; save the tokenizer beside the model"
        r" \(tokenizer\.save_pretrained\)",
    )


def test_another_vocabulary_is_refused_with_a_differing_token(base):
    small = build_tokenizer(language_spec("small"))
    sizes = (
        rf"its vocabulary \({len(TOKENIZER)} tokens, {len(TOKENIZER)} embeddings\) is not the"
        rf" data's \({len(small)} tokens\)"
    )
    message = sizes + r", first at token .*same data\.init_args\.preset and language_seed"
    _refused(NetworkSpec(path=str(base)), message, small)


def test_a_new_adapter_on_one_to_be_continued_is_refused(adapter):
    _refused(
        NetworkSpec(path=str(adapter), lora=LORA),
        r"network\.lora is set and path=.* set .*network\.adapter=merge .*or drop lora",
    )


def test_an_unknown_lora_target_is_refused_with_all_layers():
    _refused(
        NetworkSpec(shape=SHAPE, lora=LoRASpec(targets=["q_proj", "query"])),
        r"network\.lora\.targets: no linear layer is named 'query'; choose from .*k_proj.*v_proj",
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    _refused(
        NetworkSpec(shape=ShapeSpec(hidden_size=16, n_heads=3)),
        r"network\.shape: n_heads=3 does not divide hidden_size=16",
    )


@pytest.mark.parametrize("base_name", [None, "", "/nowhere/base"])
def test_an_adapter_whose_base_is_missing_is_refused(adapter, tmp_path, base_name):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": base_name})
    )
    _refused(
        NetworkSpec(path=str(tmp_path)),
        r"its adapter_config\.json names the base .*, which is no folder and not in the hub cache;"
        r" .*base_model_name_or_path",
    )


@pytest.mark.parametrize("source", ["shape", "path"])
def test_a_tokenizer_without_a_pad_token_is_refused(source, base):
    where = {"shape": SHAPE} if source == "shape" else {"path": str(base)}
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    _refused(
        NetworkSpec(**where),
        r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token",
        tokenizer,
    )
