"""Adapters from stage to stage: continued, merged, kept beside a new one; reference and export."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from temper.errors import TemperError
from temper.models import (
    AdapterOff,
    LoRASpec,
    NetworkSpec,
    ShapeSpec,
    build_network,
    export_network,
)
from temper.models.load import check_network
from temper.models.lora import (
    _find_extra,
    check_base_name,
    combine_adapters,
    disable_trained_adapter,
    save_adapter,
)
from temper.models.merge import merged_copy
from tests.errors import error_line
from tests.models.networks import IDS, LORA, TOKENIZER, build, disturb, gradients, logits

# Another rank and scale; one target layer in common with LORA.
OTHER = LoRASpec(rank=3, alpha=5, targets=["v_proj", "up_proj"])


@pytest.fixture
def both(adapter) -> torch.nn.Module:
    """The adapter, frozen, beside a new one with random weights."""
    return disturb(build(adapter, adapter="new", lora=OTHER), seed=1, only=".next.")


def test_a_new_adapter_starts_from_the_frozen_existing_one(adapter):
    network = build(adapter, adapter="new", lora=OTHER)
    assert torch.equal(logits(network), logits(build(adapter)))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained and all(
        ".next." in name and ("v_proj" in name or "up_proj" in name) for name in trained
    )
    assert {parameter.dtype for parameter in network.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    assert set(gradients(network)) == trained


def test_both_adapters_act_together(adapter, both):
    second_only = disturb(build(adapter, adapter="new", lora=OTHER), seed=1, only=".next.")
    second_only.base_model.set_adapter("next")
    assert not torch.allclose(logits(both), logits(build(adapter)), atol=1e-2)
    assert not torch.allclose(logits(both), logits(second_only), atol=1e-2)


def test_a_new_adapters_reference_has_the_existing_one(adapter, both):
    rows = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    untrained = build(adapter, adapter="new", lora=OTHER)
    wanted = AdapterOff(untrained).score(rows, "x").sums
    trained = {name: parameter.requires_grad for name, parameter in both.named_parameters()}
    before = logits(both)
    both.train()
    assert torch.equal(AdapterOff(both).score(rows, "x").sums, wanted)
    assert {name: parameter.requires_grad for name, parameter in both.named_parameters()} == trained
    assert both.training and torch.equal(logits(both), before)


def test_the_trained_adapter_is_enabled_after_an_exception(both):
    before = logits(both)
    trained = [parameter.requires_grad for parameter in both.parameters()]
    with pytest.raises(KeyError), disable_trained_adapter(both):
        assert not torch.equal(logits(both), before)
        raise KeyError
    assert torch.equal(logits(both), before)
    assert [parameter.requires_grad for parameter in both.parameters()] == trained


@pytest.mark.parametrize("policy", ["merge", "none"])
def test_the_reference_of_the_only_adapter_is_the_base_model(base, adapter, policy):
    path = adapter if policy == "merge" else base
    settings = {"adapter": "merge"} if policy == "merge" else {}
    network = disturb(build(path, lora=OTHER, **settings))
    with disable_trained_adapter(network):
        found = logits(network)
    assert torch.allclose(found, logits(build(path, **settings)), rtol=0, atol=1e-6)


def test_two_adapters_are_saved_as_one_with_the_same_outputs(both, base, tmp_path):
    before = logits(both)
    trained = {name: p.requires_grad for name, p in both.named_parameters()}
    generator = torch.get_rng_state()
    save_adapter(both, tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], set(config["target_modules"])) == (5, {"q_proj", "v_proj", "up_proj"})
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert torch.allclose(logits(by_peft), before, rtol=0, atol=1e-5)
    assert torch.allclose(logits(build(tmp_path)), before, rtol=0, atol=1e-5)
    assert (
        torch.equal(logits(both), before)
        and {name: p.requires_grad for name, p in both.named_parameters()} == trained
    )


def test_the_combined_adapter_equals_the_one_of_peft(both):
    _, weights = combine_adapters(both)
    both.base_model.add_weighted_adapter(
        ["default", "next"], [1.0, 1.0], "cat", combination_type="cat"
    )
    peft = {
        name.replace(".cat", ""): value
        for name, value in both.state_dict().items()
        if ".cat." in name
    }
    assert peft.keys() == weights.keys()
    for name, value in weights.items():
        factor = name.replace("lora_A", "lora_B") if "lora_A" in name else None
        if factor:  # PEFT puts the zeros of a missing adapter last, so compare B @ A
            assert torch.allclose(weights[factor] @ value, peft[factor] @ peft[name], atol=1e-6)


def test_a_merged_copy_has_the_outputs_of_both_adapters(both):
    before = logits(both)
    merged = merged_copy(both)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged), before, rtol=0, atol=1e-5)
    assert torch.equal(logits(both), before)


def test_an_adapter_on_a_merged_base_has_no_base_folder(adapter):
    network = build(adapter, adapter="merge", lora=OTHER)
    for nowhere in (network, build(lora=LORA)):
        with pytest.raises(
            TemperError, match=r"HFExport\.merge=false: the base .* is in no folder .*adapter=new"
        ):
            check_base_name(nowhere)


def test_an_adapter_keeps_the_name_of_its_base(base, adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)
    assert not (adapter / "tokenizer.json").exists()
    assert torch.isfinite(logits(build(adapter))).all()


def test_all_linear_layers_but_the_output_get_an_adapter(base):
    network = build(base, lora=LoRASpec(rank=1, targets="all-linear"))
    layers = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# -- refusals


def test_adapter_new_without_lora_settings_is_refused(adapter):
    with pytest.raises(
        TemperError, match=r"network\.adapter=new: .*lora\.rank=16.*adapter=continue"
    ):
        check_network(NetworkSpec(path=str(adapter), adapter="new"))


@pytest.mark.parametrize(
    "extra",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 3}},
        {"bias": "all"},
    ],
)
def test_a_new_adapter_beside_more_than_lora_is_refused(base, tmp_path, extra):
    network = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(
        network, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        TemperError,
        match=rf"adapter=new: the adapter in path=.* has {next(iter(extra))}, .*use merge",
    ):
        build(tmp_path, adapter="new", lora=LORA)
    assert torch.isfinite(logits(build(tmp_path, adapter="merge"))).all()


def test_an_adapter_of_another_kind_is_refused_beside_a_new_one(base, tmp_path):
    from peft import IA3Config

    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    with pytest.raises(TemperError, match="has the type IA3"):
        build(tmp_path, adapter="new", lora=LORA)


@pytest.mark.parametrize(
    "extra",
    [
        {"alpha_pattern": {"q_proj": 3}},
        {"trainable_token_indices": [5]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [5]},
    ],
)
def test_every_setting_beyond_plain_lora_is_found(extra):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **extra)
    assert str(_find_extra(config)).startswith(next(iter(extra)))


def test_plain_lora_of_every_shape_can_be_combined():
    plain = {"use_rslora": True, "layers_to_transform": [1], "layers_pattern": "layers"}
    plain |= {"fan_in_fan_out": True, "lora_dropout": 0.1, "init_lora_weights": "gaussian"}
    plain |= {"exclude_modules": ["k_proj"], "revision": "main", "inference_mode": True}
    assert _find_extra(LoraConfig(r=9, target_modules=["q_proj"], **plain)) is None


def _resized(base, folder, n: int, **settings: object) -> None:
    """An adapter as PEFT saves it after the embeddings of its base were resized."""
    network = AutoModelForCausalLM.from_pretrained(base)
    network.resize_token_embeddings(n)
    with torch.no_grad():
        network.lm_head.weight.add_(0.5)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    disturb(get_peft_model(network, config)).save_pretrained(folder, save_embedding_layers=True)


@pytest.mark.parametrize("policy", ["continue", "merge", "new"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_with_resized_embeddings_is_refused(base, tmp_path, policy, whole):
    n = len(TOKENIZER)
    settings = {} if whole else {"modules_to_save": ["embed_tokens", "lm_head"]}
    _resized(base, tmp_path, n + 8, **settings)
    lora = LORA if policy == "new" else None
    line = error_line(lambda: build(tmp_path, adapter=policy, lora=lora))
    named = (
        f"was trained with {n + 8} rows in" if whole else "its adapter does not fit its base model"
    )
    assert named in line and line.count("\n") == 0


def test_an_adapter_with_whole_embeddings_is_merged_or_refused(base, tmp_path):
    _resized(base, tmp_path, len(TOKENIZER))
    wanted = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path))
    assert not torch.allclose(wanted, logits(build(base)), atol=1e-2)
    assert torch.allclose(logits(build(tmp_path, adapter="merge")), wanted, atol=1e-5)
    for policy, lora in (("continue", None), ("new", LORA)):
        line = error_line(lambda p=policy, a=lora: build(tmp_path, adapter=p, lora=a))
        assert "replaces the whole layer" in line and line.endswith("use merge")


def test_an_adapter_of_another_base_is_refused_in_one_line(adapter, tmp_path):
    small = build_network(NetworkSpec(shape=ShapeSpec(32, 2, 2, 64, 32)), TOKENIZER)
    export_network(small, TOKENIZER, tmp_path / "small", merge=True)
    other = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((other / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "small")
    (other / "adapter_config.json").write_text(json.dumps(config))
    line = error_line(lambda: build(other))
    assert "its adapter does not fit its base model" in line and "size mismatch" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"lora\.rank=0: give a whole number >= 1"),
        ({"dropout": 1.0}, r"lora\.dropout=1\.0: give a number in \[0, 1\)"),
        ({"targets": []}, r"lora\.targets=\[\]: name at least one layer"),
    ],
)
def test_invalid_lora_settings_are_refused(base, change, message):
    with pytest.raises(TemperError, match=message):
        check_network(NetworkSpec(path=str(base), lora=LoRASpec(**{**vars(LORA), **change})))


def test_an_adapter_without_any_tokenizer_is_refused(base, adapter, tmp_path):
    for name in ("base", "adapter"):
        shutil.copytree(base.parent / name, tmp_path / name)
    (tmp_path / "base" / "tokenizer.json").unlink()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
        )
    )
    with pytest.raises(TemperError, match=r"no tokenizer\.json in it"):
        build(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "base")
    build(tmp_path / "adapter")
