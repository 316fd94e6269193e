"""Exports load in plain transformers, and an interrupted export leaves the old one."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network, export_network
from tests.models.networks import SHAPE, TOKENIZER, logits


def _network(seed: int = 0, lora: LoRASpec | None = None, path: Path | None = None) -> nn.Module:
    shape = None if path else ShapeSpec(**{**vars(SHAPE), "seed": seed})
    network = build_network(
        NetworkSpec(path=str(path) if path else None, shape=shape, lora=lora), TOKENIZER
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return network


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_transformers_loads_an_export_with_identicallogits(tmp_path):
    network = _network()
    folder = tmp_path / "runs" / "demo" / "export"
    export_network(network, TOKENIZER, folder, merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(network))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == TOKENIZER.get_vocab()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(_files(folder))
    assert not list(folder.glob("*.bin"))


def test_a_built_network_of_an_export_has_identicallogits(tmp_path):
    network = _network()
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    assert torch.equal(logits(_network(path=tmp_path / "export")), logits(network))


def test_a_merged_export_has_the_adapted_outputs(tmp_path):
    network = _network(lora=LoRASpec(rank=2))
    before = logits(network)
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert isinstance(loaded, LlamaForCausalLM)
    assert not (tmp_path / "export" / "adapter_config.json").exists()
    assert torch.allclose(logits(loaded), before, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(_network()), atol=1e-2), (
        "the adapter changes the logits"
    )


def test_exporting_merged_does_not_change_the_network(tmp_path):
    network = _network(lora=LoRASpec(rank=2))
    before = {
        name: (parameter.detach().clone(), parameter.requires_grad)
        for name, parameter in network.named_parameters()
    }
    export_network(network, TOKENIZER, tmp_path / "export", merge=True)
    assert isinstance(network, PeftModel)
    after = dict(network.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], value) and after[name].requires_grad == trained
        for name, (value, trained) in before.items()
    )


def test_an_adapter_alone_continues_as_the_merged_network(tmp_path):
    export_network(_network(), TOKENIZER, tmp_path / "base", merge=True)
    network = _network(path=tmp_path / "base", lora=LoRASpec(rank=2))
    export_network(network, TOKENIZER, tmp_path / "adapter", merge=False)
    export_network(network, TOKENIZER, tmp_path / "merged", merge=True)
    assert "model.safetensors" not in _files(tmp_path / "adapter")
    assert "adapter_model.safetensors" in _files(tmp_path / "adapter")
    continued = build_network(NetworkSpec(path=str(tmp_path / "adapter")), TOKENIZER)
    assert torch.equal(logits(continued), logits(network))
    assert torch.allclose(
        logits(_network(path=tmp_path / "merged")), logits(continued), rtol=0, atol=1e-5
    )


def test_an_export_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "export"
    export_network(_network(seed=1), TOKENIZER, folder, merge=True, card="text")
    assert "README.md" in _files(folder)
    network = _network(seed=2)
    export_network(network, TOKENIZER, folder, merge=True)
    assert "README.md" not in _files(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(network))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_can_be_read_by_others(tmp_path):
    export_network(_network(), TOKENIZER, tmp_path / "export", merge=True)
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()} == {0o644}


class _Interrupt(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


@pytest.mark.parametrize("error", [OSError, _Interrupt])
@pytest.mark.parametrize("step", ["network", "tokenizer", "swap"])
def test_a_failed_export_leaves_only_the_old_one(tmp_path, monkeypatch, error, step):
    folder = tmp_path / "export"
    export_network(_network(seed=1), TOKENIZER, folder, merge=True)
    before = _files(folder)

    def break_off(*args, **kwargs):
        raise error("no space left on device")

    def save_half(self, target, **kwargs):
        (Path(target) / "config.json").write_text("{")
        break_off()

    rename = os.rename

    def rename_but_fail_on_the_new_export(source, target):
        if Path(target) == folder and not str(source).endswith("-old"):
            break_off()
        rename(source, target)

    network = _network(seed=2)
    if step == "swap":
        monkeypatch.setattr(os, "rename", rename_but_fail_on_the_new_export)
    else:
        monkeypatch.setattr(
            type(network) if step == "network" else type(TOKENIZER), "save_pretrained", save_half
        )
    kept = step == "swap" and error is OSError  # the export is complete, and has no place
    with pytest.raises(TemperError if kept else error, match="no space left on device"):
        export_network(network, TOKENIZER, folder, merge=True)
    assert _files(folder) == before
    names = ["export", "export-1"] if kept else ["export"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_first_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        LlamaForCausalLM,
        "save_pretrained",
        lambda self, target: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        export_network(_network(), TOKENIZER, tmp_path / "export", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_the_old_export_is_kept_until_the_new_one_is_complete(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    export_network(_network(seed=1), TOKENIZER, folder, merge=True)
    removed = []
    rmtree = shutil.rmtree

    def watched(target, **kwargs):
        removed.append((Path(target), (folder / "model.safetensors").exists()))
        rmtree(target, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    export_network(_network(seed=2), TOKENIZER, folder, merge=True)
    assert removed
    assert all(target != folder and whole for target, whole in removed)


# -- 16 bits


@pytest.fixture
def rounded(tmp_path) -> nn.Module:
    """An adapter on a bfloat16 base, whose change is below the resolution of bfloat16."""
    export_network(_network(), TOKENIZER, tmp_path / "base", merge=True)
    network = build_network(
        NetworkSpec(path=str(tmp_path / "base"), dtype="bfloat16", lora=LoRASpec(rank=2)), TOKENIZER
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-5)
    return network


def test_merging_into_a_16_bit_base_is_done_in_float32(rounded, tmp_path):
    export_network(rounded, TOKENIZER, tmp_path / "export", merge=True, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.allclose(logits(loaded), logits(copy.deepcopy(rounded).float()), rtol=0, atol=1e-5)
    assert {
        parameter.dtype for name, parameter in rounded.named_parameters() if "lora" not in name
    } == {torch.bfloat16}


def test_a_whole_network_is_saved_in_the_given_precision(tmp_path):
    network = _network()
    export_network(network, TOKENIZER, tmp_path / "export", merge=True, dtype=torch.bfloat16)
    assert {
        p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "export").parameters()
    } == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
