"""Weight arithmetic between model folders: against plain float64, its identities, its command."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from temper.cli.console import main
from temper.edit import interpolate, remove_harm, undo
from temper.errors import TemperError
from tests.edit.models import folder_tensors, same_bytes, save_model, write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Models base, aligned and harm; read them, do not write to them."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "aligned", "harm")):
        save_model(root / name, seed)
    return root


def paths(root: Path, *names: str) -> list[str]:
    return [str(root / name) for name in names]


@pytest.mark.parametrize("a", [0.3, 1.5, 2.5])
def test_interpolation_is_the_line_in_float64(folders, tmp_path, a):
    interpolate(*paths(folders, "base", "aligned"), str(tmp_path / "out"), a)
    base, aligned, found = (
        folder_tensors(f) for f in (folders / "base", folders / "aligned", tmp_path / "out")
    )
    for name in base:
        expected = base[name].double() + a * (aligned[name].double() - base[name].double())
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
    assert not same_bytes(found, aligned)


@pytest.mark.parametrize(("a", "which"), [(0.0, "base"), (1.0, "aligned")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_line_are_the_models_bit_for_bit(tmp_path, a, which, dtype):
    for seed, name in enumerate(("base", "aligned")):
        save_model(tmp_path / name, seed, dtype)
    interpolate(*paths(tmp_path, "base", "aligned", "out"), a)
    assert same_bytes(folder_tensors(tmp_path / "out"), folder_tensors(tmp_path / which))


def test_low_precision_is_rounded_once(tmp_path):
    for seed, name in enumerate(("base", "aligned")):
        save_model(tmp_path / name, seed, torch.bfloat16)
    interpolate(*paths(tmp_path, "base", "aligned", "out"), 1.7)
    base, aligned, found = (folder_tensors(tmp_path / n) for n in ("base", "aligned", "out"))
    for name in base:
        assert torch.equal(
            found[name],
            (base[name].float() + 1.7 * (aligned[name].float() - base[name].float())).bfloat16(),
        )


def test_the_result_is_a_model_with_tokenizer_and_edit_card(folders, tmp_path):
    interpolate(*paths(folders, "base", "aligned"), str(tmp_path / "out"), 1.5)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_bytes(dict(network.state_dict()), folder_tensors(tmp_path / "out"))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        == AutoTokenizer.from_pretrained(folders / "base").get_vocab()
    )
    card = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert (card["edit"], card["settings"]) == ("interpolate", {"a": 1.5})
    for name in ("base", "aligned"):
        digest = hashlib.sha256((folders / name / "model.safetensors").read_bytes()).hexdigest()
        assert card["inputs"][name] == {
            "path": str(folders / name),
            "sha256": {"model.safetensors": digest},
        }


def test_inputs_may_be_sharded_differently(folders, tmp_path):
    shutil.copytree(folders / "aligned", tmp_path / "aligned")
    tensors = list(folder_tensors(folders / "aligned").items())
    write_shards(tmp_path / "aligned", one=dict(tensors[:5]), two=dict(tensors[5:]))
    interpolate(str(folders / "base"), *paths(tmp_path, "aligned", "split"), 1.5)
    interpolate(*paths(folders, "base", "aligned"), str(tmp_path / "whole"), 1.5)
    assert same_bytes(folder_tensors(tmp_path / "split"), folder_tensors(tmp_path / "whole"))
    assert sorted(p.name for p in (tmp_path / "split").glob("*.safetensors")) == [
        "model-one.safetensors",
        "model-two.safetensors",
    ]


def plain_top_difference(harm: dict, base: dict, top: float) -> dict[str, torch.Tensor]:
    """Top-K % of the difference over the whole model, by sorting all of it."""
    flat = torch.cat([(harm[n] - base[n]).flatten() for n in harm])
    k = int(len(flat) * top / 100)
    threshold = flat.abs().sort(descending=True).values[k - 1]
    return {
        n: torch.where((harm[n] - base[n]).abs() >= threshold, harm[n] - base[n], 0.0) for n in harm
    }


@pytest.mark.parametrize("top", [0.5, 10.0, 100.0])
def test_harm_removal_takes_largest_entries_of_the_whole_model(folders, tmp_path, top):
    remove_harm(*paths(folders, "aligned", "harm", "base"), str(tmp_path / "out"), 0.7, top)
    theta, harm, base, found = (
        folder_tensors(f)
        for f in (*(folders / n for n in ("aligned", "harm", "base")), tmp_path / "out")
    )
    vector = plain_top_difference(harm, base, top)
    n_all = sum(t.numel() for t in theta.values())
    changed = 0
    for name in theta:
        expected = theta[name].double() - 0.7 * vector[name].double()
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(found[name][vector[name] == 0], theta[name][vector[name] == 0])
        changed += int((vector[name] != 0).sum())
    settings = json.loads((tmp_path / "out" / "edit.json").read_text())["settings"]
    sizes = (
        torch.cat([(harm[n] - base[n]).flatten().abs() for n in harm]).sort(descending=True).values
    )
    assert settings["threshold"] == float(sizes[int(n_all * top / 100) - 1])
    # Norms that no model has changed differ nowhere and are never among the top.
    assert settings["entries_changed"] == changed <= int(n_all * top / 100)
    assert changed == int(n_all * top / 100) or top == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_restores_every_bit(tmp_path, dtype):
    for seed, name in enumerate(("model", "harm", "base")):
        save_model(tmp_path / name, seed, dtype)
    before = hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    remove_harm(*paths(tmp_path, "model", "harm", "base", "out"), 1.3, 25.0)
    assert not same_bytes(folder_tensors(tmp_path / "out"), folder_tensors(tmp_path / "model"))
    undo(*paths(tmp_path, "out", "back"))
    assert same_bytes(folder_tensors(tmp_path / "back"), folder_tensors(tmp_path / "model"))
    assert not (tmp_path / "back" / "removed.safetensors").exists()
    assert (
        hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
        == before
    )


def test_removing_with_lam_zero_changes_no_bit(tmp_path, folders):
    shutil.copytree(folders / "aligned", tmp_path / "model")
    tensors = folder_tensors(tmp_path / "model")
    tensors["lm_head.weight"][0, 0] = -0.0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    remove_harm(
        str(tmp_path / "model"), *paths(folders, "harm", "base"), str(tmp_path / "out"), 0.0
    )
    assert same_bytes(folder_tensors(tmp_path / "out"), tensors)
    undo(*paths(tmp_path, "out", "back"))
    assert same_bytes(folder_tensors(tmp_path / "back"), tensors)


def test_nothing_is_removed_where_the_models_do_not_differ(folders, tmp_path):
    remove_harm(*paths(folders, "aligned", "base", "base"), str(tmp_path / "out"), 1.0)
    assert same_bytes(folder_tensors(tmp_path / "out"), folder_tensors(folders / "aligned"))


def test_a_diverged_harmful_model_is_refused_and_leaves_nothing(folders, tmp_path):
    shutil.copytree(folders / "harm", tmp_path / "harm")
    tensors = folder_tensors(tmp_path / "harm")
    tensors["lm_head.weight"][3, 2] = float("nan")
    save_file(tensors, tmp_path / "harm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TemperError, match="lm_head.weight is not finite"):
        remove_harm(
            str(folders / "aligned"),
            str(tmp_path / "harm"),
            str(folders / "base"),
            str(tmp_path / "out"),
        )
    assert [p.name for p in tmp_path.iterdir()] == ["harm"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: save_model(f, 3, hidden_size=32),
            r"--base=.* and --aligned=.*: .* is F32 \[.*\] in one and F32 \[",
        ),
        (lambda f: save_model(f, 3, num_hidden_layers=1), "only one of them has"),
        (lambda f: save_model(f, 3, torch.bfloat16), "F32.* in one and .*BF16"),
        (
            lambda f: (f / "config.json").write_text(
                '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
            ),
            "architectures is",
        ),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            "--aligned=.*: a LoRA adapter.*HFExport.merge=true",
        ),
        (lambda f: (f / "config.json").unlink(), "--aligned=.*: no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "--aligned=.*: no model.safetensors"),
        (lambda f: shutil.rmtree(f), "--aligned=.*: no such folder"),
    ],
)
def test_folders_of_different_networks_are_refused(folders, tmp_path, spoil, message):
    shutil.copytree(folders / "aligned", tmp_path / "aligned")
    spoil(tmp_path / "aligned")
    with pytest.raises(TemperError, match=message):
        interpolate(str(folders / "base"), *paths(tmp_path, "aligned", "out"))
    assert not (tmp_path / "out").exists()


def test_a_target_that_is_an_input_or_a_users_is_refused(folders, tmp_path):
    with pytest.raises(TemperError, match="--out=.*one of the inputs"):
        interpolate(*paths(folders, "base", "aligned"), str(folders / "harm" / ".." / "base"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TemperError, match="--out=.*holds notes.txt"):
        interpolate(*paths(folders, "base", "aligned"), str(tmp_path))
    assert (tmp_path / "notes.txt").exists()


def test_links_out_of_a_model_are_not_followed(folders, tmp_path):
    shutil.copytree(folders / "aligned", tmp_path / "aligned")
    (tmp_path / "key.txt").write_text("secret")
    (tmp_path / "aligned" / "notes.txt").symlink_to(tmp_path / "key.txt")
    with pytest.raises(TemperError, match="--aligned=.*notes.txt is a symbolic link to .*key.txt"):
        interpolate(*paths(folders, "base"), *paths(tmp_path, "aligned", "out"))
    assert not (tmp_path / "out").exists()


def test_other_weights_in_a_folder_are_not_passed_on(folders, tmp_path):
    shutil.copytree(folders / "aligned", tmp_path / "aligned")
    weights = tmp_path / "aligned" / "model.safetensors"
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copy(weights, weights.with_name(name))
    interpolate(*paths(folders, "base"), *paths(tmp_path, "aligned", "out"))
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_damaged_and_missing_weights_are_one_line(folders, tmp_path):
    shutil.copytree(folders / "aligned", tmp_path / "aligned")
    weights = tmp_path / "aligned" / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", b"not tensors at all", whole[:40]):
        weights.write_bytes(content)
        with pytest.raises(TemperError, match="--aligned=.*model.safetensors is no safetensors"):
            interpolate(*paths(folders, "base"), *paths(tmp_path, "aligned", "out"))
    weights.rename(weights.with_name("model-1.safetensors"))
    index = {"weight_map": {"lm_head.weight": "model-2.safetensors"}}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TemperError, match="--aligned=.*model-2.safetensors is missing"):
        interpolate(*paths(folders, "base"), *paths(tmp_path, "aligned", "out"))


def test_a_result_is_replaced_and_a_failure_keeps_it(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interpolate(*paths(folders, "base", "aligned"), str(out), 1.5)
    interpolate(*paths(folders, "base", "aligned"), str(out), 0.0)
    assert same_bytes(folder_tensors(out), folder_tensors(folders / "base"))
    monkeypatch.setattr("temper.edit.folders.interpolate_tensor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interpolate(*paths(folders, "base", "aligned"), str(out), 1.5)
    assert same_bytes(folder_tensors(out), folder_tensors(folders / "base"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "interpolate --base x --aligned y --out z --a 2.6",
            r"--a=2.6: give a number in \[0, 2.5\].*--a_max",
        ),
        (
            "interpolate --base x --aligned y --out z --a -0.1",
            r"--a=-0.1: give a number in \[0, 2.5\]",
        ),
        ("interpolate --base x --aligned y --out z --a nan", "nan"),
        ("interpolate --base x --align y --out z", "--align.*did you mean --aligned"),
        ("interpolate --base x --out z", "aligned"),
        (
            "remove-harm --model x --harm y --base z --out o --lam -1",
            "--lam=-1.0: give a number >= 0",
        ),
        (
            "remove-harm --model x --harm y --base z --out o --top 0",
            r"--top=0.0: give a percentage in \(0, 100\]",
        ),
        ("extrapolate", "invalid choice: 'extrapolate'"),
    ],
)
def test_the_command_line_refuses_in_one_line(words, message, capsys):
    assert main(["edit", *words.split()]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert re.search(message, printed), printed


def test_the_command_runs_in_its_own_process(folders, tmp_path):
    words = [
        "remove-harm",
        "--model",
        *paths(folders, "aligned"),
        "--harm",
        *paths(folders, "harm"),
        "--base",
        *paths(folders, "base"),
    ]
    command = [
        sys.executable,
        "-m",
        "temper.edit",
        *words,
        "--out",
        str(tmp_path / "out"),
        "--lam",
        "0.5",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    remove_harm(*paths(folders, "aligned", "harm", "base"), str(tmp_path / "same"), 0.5)
    assert same_bytes(folder_tensors(tmp_path / "out"), folder_tensors(tmp_path / "same"))
    assert load_file(tmp_path / "out" / "removed.safetensors")
