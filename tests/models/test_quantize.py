"""4- and 8-bit base models: training before and after an evaluation, checkpoints and merging."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from temper.errors import TemperError
from temper.models import AdapterOff, FrozenCopy, LoRASpec, NetworkSpec
from temper.models.load import check_network
from temper.models.merge import merged_copy
from temper.models.quantize import is_quantized
from tests.errors import error_line
from tests.models.networks import IDS, LORA, build, disturb, gradients, logits

pytest.importorskip("bitsandbytes")
KINDS = ["nf4", "int8"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_quantized_and_the_adapter_is_in_fp32(base, kind, dtype):
    network = build(base, lora=LORA, quantization=kind, dtype=dtype)
    layer = network.get_base_model().model.layers[0].self_attn.k_proj
    assert layer.weight.dtype == {"nf4": torch.uint8, "int8": torch.int8}[kind]
    assert {parameter.dtype for parameter in network.parameters() if parameter.requires_grad} == {
        torch.float32
    }
    assert network.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert is_quantized(network)
    if kind == "nf4":
        assert layer.weight.quant_state.nested and layer.weight.quant_state.quant_type == "nf4"
        assert layer.compute_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_logits_are_near_those_of_the_base(base, kind):
    plain = logits(build(base))
    quantized = logits(build(base, lora=LORA, quantization=kind))
    assert not torch.equal(plain, quantized)
    assert torch.nn.functional.cosine_similarity(plain.flatten(), quantized.flatten(), dim=0) > 0.97


def test_an_evaluation_in_8_bits_logs_no_warning(base, caplog):
    logits(build(base, lora=LORA, quantization="int8"))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_after_an_evaluation_are_those_before_it(base, kind):
    network = disturb(build(base, lora=LORA, quantization=kind))
    before = gradients(network)
    assert all(gradient.norm() > 0 for gradient in before.values())
    logits(network)
    after = gradients(network)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", [AdapterOff, FrozenCopy])
def test_references_do_not_change_a_quantized_network(base, kind, reference):
    network = disturb(build(base, lora=LORA, quantization=kind))
    before = gradients(network)
    rows = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}

    def sums(scored: torch.nn.Module) -> torch.Tensor:
        logps = torch.log_softmax(logits(scored)[:, :-1], -1)
        return logps.gather(-1, IDS[:, 1:, None]).sum((1, 2))

    wanted = sums(network)
    if reference is AdapterOff:
        wanted = sums(build(base, lora=LORA, quantization=kind))
    assert torch.allclose(reference(network).score(rows, "x").sums, wanted, atol=1e-4)
    assert all(torch.equal(before[name], gradient) for name, gradient in gradients(network).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["continue", "new"])
def test_a_merged_copy_is_dense_and_has_the_outputs_of_training(adapter, tmp_path, kind, policy):
    network = build(
        adapter,
        quantization=kind,
        adapter=policy,
        lora=LoRASpec(rank=3, targets=["up_proj"]) if policy == "new" else None,
    )
    disturb(network, only="next" if policy == "new" else "default")
    logits(network)  # an evaluation before the export
    before = copy.deepcopy(network.state_dict())
    merged = merged_copy(network)
    assert not is_quantized(merged)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():  # in training mode: in evaluation mode, int8 rounds inputs too
        seen = network.train()(input_ids=IDS).logits
    # Dequantised through bfloat16 by transformers where the scales are nested.
    assert torch.allclose(logits(loaded), seen, rtol=0, atol=2e-2 if kind == "nf4" else 1e-4)
    assert torch.equal(loaded.model.embed_tokens.weight, network.get_input_embeddings().weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_a_quantized_network_loads(base, tmp_path, kind):
    network = disturb(build(base, lora=LORA, quantization=kind))
    wanted = logits(network)
    torch.save(network.state_dict(), tmp_path / "x.ckpt")
    other = build(base, lora=LORA, quantization=kind)
    assert not torch.equal(logits(other), wanted)
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True))
    assert torch.equal(logits(other), wanted)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("nf4", "absmax"), ("nf4", "k_proj.weight"), ("int8", "SCB"), ("int8", "k_proj.weight")],
)
def test_a_checkpoint_of_another_base_is_refused(base, kind, suffix):
    state = build(base, lora=LORA, quantization=kind).state_dict()
    name = next(name for name in state if name.endswith(suffix))
    state[name] = state[name] + 1
    with pytest.raises(TemperError, match=r"ckpt_path: .* of the checkpoint is of another model"):
        build(base, lora=LORA, quantization=kind).load_state_dict(state)


# -- refusals


def _refused(message: str, **settings: object) -> None:
    line = error_line(lambda: check_network(NetworkSpec(**settings)))  # type: ignore[arg-type]
    assert re.search(message, line)


def test_full_fine_tuning_of_quantized_weights_is_refused(base, adapter):
    _refused(
        r"nf4 weights are frozen, .*lora\.rank=16, or drop quantization for full",
        path=str(base),
        quantization="nf4",
    )
    check_network(NetworkSpec(path=str(adapter), quantization="nf4"))  # its adapter is trained


def test_merging_into_quantized_weights_is_refused(adapter):
    _refused(
        r"adapter=merge with int8 weights: .*use adapter=new or continue",
        path=str(adapter),
        quantization="int8",
        adapter="merge",
    )


def test_merging_into_a_stored_quantized_base_is_refused(base, adapter, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    stored, on_it = (
        Path(shutil.copytree(source, tmp_path / name))
        for source, name in ((base, "stored"), (adapter, "on_it"))
    )
    (stored / "config.json").write_text(json.dumps(config))
    found = json.loads((on_it / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(stored)
    }
    (on_it / "adapter_config.json").write_text(json.dumps(found))
    with pytest.raises(
        TemperError,
        match=r"adapter=merge with bitsandbytes weights: .*use adapter=new or continue",
    ):
        build(on_it, adapter="merge")


def test_a_quantized_folder_cannot_be_quantized_or_tuned(base, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    _refused(
        r"quantization=nf4: the weights in path=.* are quantized already \(gptq\); drop it",
        path=str(tmp_path),
        quantization="nf4",
        lora=LORA,
    )
    _refused(r"gptq weights are frozen, .*lora\.rank=16$", path=str(tmp_path))


def test_without_bitsandbytes_the_package_is_named(base, monkeypatch):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object()
    )
    _refused(
        r"quantization=nf4: .*pip install -e '\.\[bitsandbytes\]'",
        path=str(base),
        quantization="nf4",
        lora=LORA,
    )
    assert "bitsandbytes" in sys.modules
