"""Checks of a model folder: pickles, indices, the hub cache, remote code, damaged weights."""

import json
import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.models.folder import tokenizer_folder
from temper.models.load import check_network, hidden_size
from temper.models.lora import save_adapter
from tests.errors import error_line
from tests.models.networks import LORA, TOKENIZER, build, logits
from tests.pickles import Bomb

HUB = "some-org/some-model"


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A copy of `base`."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def _refused(path: Path | str, message: str, **settings) -> None:
    for attempt in (
        lambda: check_network(NetworkSpec(path=str(path), **settings)),
        lambda: build(path, **settings),
    ):
        assert re.search(message, error_line(attempt))


# -- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_in_a_pickle_are_refused_unread(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weights": Bomb(tmp_path / "marker")}))
    _refused(
        folder,
        rf"network\.path=.*: {name} is a pickle, .*any code.*save_pretrained",
    )
    assert not (tmp_path / "marker").exists()
    pickle.loads((folder / name).read_bytes())
    assert (tmp_path / "marker").exists(), "the payload works"


def test_a_pickle_beside_safetensors_is_not_read(folder, base, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Bomb(tmp_path / "marker")}))
    assert torch.equal(logits(build(folder)), logits(build(base)))
    assert not (tmp_path / "marker").exists()


def test_an_index_does_not_replace_the_weights_of_an_adapter(base, tmp_path):
    save_adapter(build(base, lora=LORA), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(
        pickle.dumps({"weights": Bomb(tmp_path / "marker")})
    )
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    _refused(tmp_path, r"network\.path=.*: adapter_model\.bin is a pickle")
    assert not (tmp_path / "marker").exists()


def test_an_adapter_in_a_pickle_is_refused_unread(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    save_adapter(build(base, lora=LORA), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(
        pickle.dumps(Bomb(tmp_path / "marker"))
    )
    _refused(
        tmp_path / "adapter", r"adapter_model\.bin is a pickle.*no adapter_model\.safetensors in it"
    )
    assert not (tmp_path / "marker").exists()


def test_an_adapter_whose_base_is_a_pickle_is_refused(base, folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    save_adapter(build(folder, lora=LORA), tmp_path / "adapter")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(TemperError, match=rf"path={folder}: pytorch_model\.bin is a pickle"):
        build(tmp_path / "adapter")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    _refused(folder, r"no model\.safetensors in it")


# -- the index of a network in several files


def _shard(folder: Path, file: object) -> None:
    """Shard the weights, and set the last file name in the index unless it is None."""
    network = build(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="40KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert len(set(index["weight_map"].values())) > 1
    if file is not None:
        index["weight_map"][next(reversed(index["weight_map"]))] = file
    path.write_text(json.dumps(index))


def test_a_sharded_network_loads(folder, base):
    _shard(folder, None)
    assert torch.equal(logits(build(folder)), logits(build(base)))


@pytest.mark.parametrize(
    "file",
    [
        "../other.safetensors",
        "a/../../other.safetensors",
        "/etc/other.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "",
        3,
        None,
    ],
)
def test_an_index_that_points_out_of_the_folder_is_refused(folder, tmp_path, file):
    # The file exists, and must not be read.
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    _shard(folder, {"a": 1} if file is None else file)
    _refused(
        folder,
        r"model\.safetensors\.index\.json names .* not inside the folder",
    )


@pytest.mark.parametrize("text", ["{", "[1]", "\ufeff{}"])
def test_an_unreadable_index_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    _refused(folder, r"model\.safetensors\.index\.json (cannot be read|holds no JSON object)")


# -- the hub


def test_an_uncached_hub_name_is_refused_with_the_download(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", _absent(LocalEntryNotFoundError("not there"))
    )
    _refused(
        HUB,
        r"path=some-org/some-model: no such folder, and no model .* local hub cache;"
        r" .*--model\.init_args\.network\.local_files_only=false",
    )
    _refused(HUB, r"of that name \(revision v2\) in the local hub cache", revision="v2")


def test_only_the_local_cache_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", _absent(AssertionError("the network was used")))
    _refused(HUB, "in the local hub cache")


def _absent(error: Exception):
    def raise_it(*arguments, **settings):
        raise error

    return raise_it


def test_errors_of_the_hub_are_part_of_the_message(monkeypatch):
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        _absent(OfflineModeIsEnabled("the hub\ncannot be reached")),
    )
    spec = NetworkSpec(path=HUB, local_files_only=False)
    check_network(spec)  # checks before a run download nothing
    with pytest.raises(
        TemperError,
        match=r"the hub did not give .*: the hub; check name, network and access",
    ):
        build(HUB, local_files_only=False)


def test_a_hub_name_is_loaded_from_the_cache_at_its_revision(base, monkeypatch, tmp_path):
    calls = []

    def cached(name, **settings):
        calls.append((name, settings))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    network = build(HUB, revision="abc", lora=LORA)
    assert torch.equal(logits(network), logits(build(base)))
    name, settings = calls[-1]
    assert (name, settings["revision"], settings["local_files_only"]) == (HUB, "abc", True)
    assert not any(
        pattern.endswith(("bin", "pt", "py", "*")) for pattern in settings["allow_patterns"]
    )
    assert any("*.safetensors" in settings["allow_patterns"] for _, settings in calls)
    spec = NetworkSpec(path=HUB, revision="abc")
    assert tokenizer_folder(spec) == base and hidden_size(spec) == network.config.hidden_size
    assert ["*.safetensors" in settings["allow_patterns"] for _, settings in calls[-2:]] == [
        False,
        False,
    ], "weights are not needed for it"
    save_adapter(network, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB, "abc")
    build(tmp_path)
    assert (calls[-1][0], calls[-1][1]["revision"]) == (HUB, "abc")


def test_a_folder_has_no_revision(base):
    _refused(
        base, r"network\.revision=v2: path=.* is a folder, which has no revisions", revision="v2"
    )


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "a/b/c", "../x/y", ""])
def test_a_path_that_is_neither_folder_nor_hub_name_is_refused(path):
    _refused(path, r"no such folder; give a folder with config\.json")


# -- code that comes with a model


def _with_code(folder: Path, marker: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config | own))


def test_code_of_a_model_runs_only_if_it_is_trusted(folder, base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    _with_code(folder, tmp_path / "marker")
    with pytest.raises(TemperError, match=r"trust_remote_code=true if you trust its authors"):
        build(folder)
    assert not (tmp_path / "marker").exists()
    assert torch.equal(logits(build(folder, trust_remote_code=True)), logits(build(base)))
    assert (tmp_path / "marker").exists()


def test_errors_of_damaged_or_wrong_weights_are_one_line(folder):
    weights = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(
        TemperError,
        match=r"network\.path=.*: transformers cannot load it: .*; its weights are damaged",
    ):
        build(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(
        json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2})
    )
    with pytest.raises(
        TemperError,
        match=(
            r"network\.path=.*: transformers cannot load it: [^\n]*; its weights are damaged[^\n]*$"
        ),
    ):
        build(folder)


def test_errors_of_transformers_are_one_line(folder):
    (folder / "config.json").write_text(
        json.dumps({"model_type": "no-such-type", "vocab_size": len(TOKENIZER)})
    )
    with pytest.raises(
        TemperError, match=r"network\.path=.*: transformers cannot load it: .*no-such-type"
    ):
        build(folder)
