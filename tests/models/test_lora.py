"""Adapters from stage to stage: continued, merged, kept beside a new one; reference and export."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from temper.errors import TemperError
from temper.models import AdapterOff, LoRASpec, NetworkSpec
from temper.models.load import check_network
from temper.models.lora import (
    check_base_name,
    combine_adapters,
    disable_trained_adapter,
    save_adapter,
)
from temper.models.merge import merged_copy
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
