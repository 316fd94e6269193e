"""Networks from a shape or a folder: seeds, adapters, precision, attention, invalid settings."""

import json
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network
from temper.models.load import check_network
from temper.synthetic import build_tokenizer, language_spec
from tests.errors import error_line
from tests.models.networks import LORA, SHAPE, TOKENIZER, build, logits


def test_a_shape_has_given_sizes_and_the_data_vocabulary():
    network = build_network(NetworkSpec(shape=SHAPE), TOKENIZER)
    config = network.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 2)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (
        64,
        32,
        len(TOKENIZER),
    )
    assert logits(network).shape == (2, 5, len(TOKENIZER))
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
    assert len(trained) == 8  # A and B of two projections in two layers
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert not any("lora_" in name for name in frozen)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
    assert {min(parameter.shape) for parameter in trained.values()} == {LORA.rank}


def test_a_new_adapter_changes_no_output(base):
    plain, adapted = (
        build_network(NetworkSpec(path=str(base), lora=lora), TOKENIZER) for lora in (None, LORA)
    )
    assert torch.equal(logits(plain), logits(adapted))


def test_a_continued_adapter_is_the_stored_one_trained_in_fp32(base, adapter):
    network = build_network(NetworkSpec(path=str(adapter), dtype="bfloat16"), TOKENIZER)
    assert isinstance(network, PeftModel)
    trained = [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    assert len(trained) == 8
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained)
    assert network.generation_config.pad_token_id == TOKENIZER.pad_token_id
    exact = build_network(NetworkSpec(path=str(adapter)), TOKENIZER)
    plain = build_network(NetworkSpec(path=str(base)), TOKENIZER)
    assert not torch.allclose(logits(exact), logits(plain), atol=1e-2)


def test_a_merged_adapter_equals_the_continued_one_to_1e_5(adapter):
    continued = build_network(NetworkSpec(path=str(adapter)), TOKENIZER)
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    assert not isinstance(merged, PeftModel)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(continued), rtol=0, atol=1e-5)


def test_after_merging_an_adapter_all_weights_are_trained(adapter):
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_new_adapter_on_a_merged_one_starts_from_its_outputs(adapter):
    merged = build_network(NetworkSpec(path=str(adapter), adapter="merge"), TOKENIZER)
    fresh = build_network(NetworkSpec(path=str(adapter), adapter="merge", lora=LORA), TOKENIZER)
    assert torch.allclose(logits(fresh), logits(merged), rtol=0, atol=1e-6)
    assert sum(parameter.requires_grad for parameter in fresh.parameters()) == 8
    assert all(
        "lora_" in name for name, parameter in fresh.named_parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_given_attention_implementation_is_used(base, attention):
    for path in (None, base):
        network = build(path, attention=attention)
        assert network.config._attn_implementation == attention
        assert torch.allclose(logits(network), logits(build(path)), atol=1e-6)


# -- refusals


def _refused(
    spec: NetworkSpec, message: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER
) -> None:
    assert re.search(message, error_line(lambda: build_network(spec, tokenizer)))


def test_neither_path_nor_shape_is_refused():
    _refused(
        NetworkSpec(),
        r"model\.init_args\.network: neither of path and shape given; .*--",
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
        r"no tokenizer\.json in it; .*tokenizer\.save_pretrained",
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
        r"its adapter_config\.json names the base .* hub cache; .*base_model_name_or_path",
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shape": SHAPE, "revision": "v2"},
            r"network\.revision=v2 is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "trust_remote_code": True},
            r"network\.trust_remote_code=True is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "quantization": "nf4", "lora": LORA},
            r"network\.quantization=nf4 is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "attention": "flash_attention_2"},
            r"attention=flash_attention_2 .*pip install flash-attn, or use sdpa",
        ),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(TemperError, match=message):
        check_network(NetworkSpec(**settings))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has the backward pass")
def test_flex_attention_is_refused_on_a_cpu():
    with pytest.raises(
        TemperError, match="attention=flex_attention has no backward pass on a CPU: use sdpa"
    ):
        check_network(NetworkSpec(shape=SHAPE, attention="flex_attention"))


def test_flash_attention_in_32_bits_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(
        TemperError, match="attention=flash_attention_2 computes in 16 bits: set dtype=bfloat16"
    ):
        check_network(NetworkSpec(shape=SHAPE, attention="flash_attention_2"))
