"""Folders of judges are checked as those of networks; errors are one line and name the judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from temper.judges import GuardLM, SequenceClassifier
from tests.errors import error_line
from tests.judges.models import CHAT, classifier_folder, lm_folder, words_tokenizer


def _refusal(judge) -> str:
    line = error_line(lambda: judge(["q"], ["a"]))
    assert "model.init_args" not in line
    return line


def _pickle_weights(folder: Path) -> Path:
    """Replace the safetensors of a folder by a pickle; return the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("kind", [GuardLM, SequenceClassifier])
def test_weights_in_a_pickle_alone_are_refused(kind, tmp_path):
    folder = _pickle_weights(lm_folder(tmp_path, CHAT))
    line = _refusal(kind(str(folder)))
    assert line.startswith(
        f"{kind.__name__}.path={folder}: pytorch_model.bin is a pickle, and reading one can run any"
        " code"
    )


def test_an_index_that_points_out_of_the_folder_is_refused(lm, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(lm, folder)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}})
    )
    line = _refusal(GuardLM(str(folder)))
    assert line.startswith(
        f"GuardLM.path={folder}: model.safetensors.index.json names '../other.safetensors', "
    )


def test_the_base_of_an_adapter_is_checked_too(tmp_path):
    base = lm_folder(tmp_path / "base")
    folder = tmp_path / "judge"
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(folder)
    words_tokenizer(CHAT).save_pretrained(folder)
    _pickle_weights(base)
    assert _refusal(GuardLM(str(folder))).startswith(
        f"GuardLM.path={base}: pytorch_model.bin is a pickle"
    )


def test_damaged_weights_are_refused(tmp_path):
    folder = classifier_folder(tmp_path, num_labels=1)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"SequenceClassifier.path={folder}: cannot be loaded (" in _refusal(
        SequenceClassifier(str(folder))
    )


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    assert _refusal(GuardLM(str(tmp_path / "nothing"))).startswith(
        f"GuardLM.path={tmp_path / 'nothing'}: no such folder; give a folder"
    )
    assert (
        f"GuardLM.path={tmp_path}: neither config.json nor adapter_config.json in it"
        in _refusal(GuardLM(str(tmp_path)))
    )


def test_an_uncached_hub_name_is_refused_without_a_download():
    line = _refusal(GuardLM("no-such-organisation/no-such-guard"))
    assert "no model of that name in the local hub cache" in line and line.endswith(
        "download it from the hub: local_files_only: false"
    )


def test_a_revision_of_a_folder_is_refused(lm):
    assert _refusal(GuardLM(str(lm), revision="main")).startswith("GuardLM.revision=main: path=")


def _adapter_judge(base: Path, folder: Path, **settings: object) -> Path:
    network = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(network, LoraConfig(target_modules=["q_proj"], **settings)).save_pretrained(
        folder
    )
    words_tokenizer(CHAT).save_pretrained(folder)
    return folder


def test_a_judge_whose_weights_are_incomplete_is_refused(tmp_path):
    base = lm_folder(tmp_path / "base", CHAT)
    adapter = _adapter_judge(base, tmp_path / "judge")
    stored = adapter / "adapter_model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(stored).items()}, stored)
    assert "its adapter lacks" in _refusal(GuardLM(str(adapter)))
    config = json.loads((base / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (base / "config.json").write_text(json.dumps(config))
    for folder in (base, adapter):
        line = _refusal(GuardLM(str(folder)))
        assert line.startswith(f"GuardLM.path={folder}: its files lack 9 weights")


def test_a_judge_with_more_tokens_than_embeddings_is_refused(tmp_path):
    folder = lm_folder(tmp_path, CHAT)
    tokenizer = words_tokenizer(CHAT)
    tokenizer.add_tokens(["spoon"])
    tokenizer.save_pretrained(folder)
    assert "'spoon' has the id" in _refusal(GuardLM(str(folder)))


def test_a_link_out_of_a_judges_folder_is_refused(lm, tmp_path):
    folder = tmp_path / "judge"
    shutil.copytree(lm, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(lm / "model.safetensors")
    assert "model.safetensors is a symbolic link" in _refusal(GuardLM(str(folder)))
