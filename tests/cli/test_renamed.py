"""Configs of earlier versions are read, or refused with what took the place of an old name."""

import importlib
from pathlib import Path

import pytest
import yaml

from temper.cli import renamed
from temper.cli.renamed import CLASSES, CONFIGS, OPTIONS, as_markdown, translated

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def first_time():
    """As in a new process, which has printed nothing."""
    renamed._say.cache_clear()


def _exists(path: str) -> bool:
    module, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("pair", CLASSES, ids=lambda pair: pair.old)
def test_an_old_class_path_is_gone_and_the_new_one_exists(pair):
    assert _exists(pair.new)
    assert not _exists(pair.old)


@pytest.mark.parametrize("pair", CONFIGS, ids=lambda pair: pair.old)
def test_a_moved_config_has_existing_files_in_its_place(pair):
    for file in pair.new.split(" with "):
        assert (ROOT / file).is_file()


def test_class_paths_are_translated_at_any_depth_and_noted_once(capsys):
    old = {"judges": [{"class_path": "temper.judges.yes_no.YesNoLM", "init_args": {"path": "x"}}]}
    new = {"judges": [{"class_path": "temper.judges.YesNoLM", "init_args": {"path": "x"}}]}
    assert translated(old) == new
    assert translated(old) == new
    assert capsys.readouterr().err == (
        "note: temper.judges.yes_no.YesNoLM is temper.judges.YesNoLM now; reading it as that\n"
    )


def test_other_values_are_left_as_they_are(capsys):
    value = {"lr": 1e-3, "names": ["temper.judges.YesNoLM", None], "text": "yes_no"}
    assert translated(value) == value
    assert capsys.readouterr().err == ""


def test_other_ranks_print_nothing(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    translated(CLASSES[0].old)
    assert capsys.readouterr().err == ""


def test_a_saved_config_with_old_class_paths_trains(command_line, tiny_run, tmp_path, capsys):
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    config["trainer"]["plugins"] = [{"class_path": "temper.cli.BackgroundCheckpointIO"}]
    config["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    command_line("fit", f"--config={tmp_path / 'old.yaml'}")
    assert capsys.readouterr().err.count("note: temper.cli.BackgroundCheckpointIO is ") == 1
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (plugin,) = saved["trainer"]["plugins"]
    assert plugin["class_path"] == "temper.cli.checkpoint_io.BackgroundCheckpointIO"


def test_an_old_class_path_as_a_flag_is_refused(refused):
    line = refused("--model=lightning_modules.safe_instruct.SafeInstructModule")
    assert line == (
        "lightning_modules.safe_instruct.SafeInstructModule was renamed;"
        " give lightning_modules.SafeInstructModule"
    )


@pytest.mark.parametrize("pair", CONFIGS, ids=lambda pair: pair.old)
def test_a_replaced_config_file_is_refused_with_the_new_ones(pair, refused):
    assert not (ROOT / pair.old).exists()
    assert refused(f"--config={pair.old}") == (
        f"--config={pair.old}: this file was replaced; give {pair.new}"
    )


@pytest.mark.parametrize("pair", OPTIONS, ids=lambda pair: pair.old)
def test_a_moved_option_is_refused_with_its_new_class(pair, refused, tmp_path):
    kind, option = pair.old.split(".")
    own = tmp_path / "own.yaml"
    own.write_text(f"model: {{init_args: {{{option}: 4}}}}\n")
    for words in ([f"--config={own}"], [f"--model.init_args.{option}=4"]):
        config = {"BoosterModule": "booster", "DPOModule": "dpo"}[kind]
        line = refused(f"--config=configs/objective/{config}.yaml", *words, data="alignment")
        assert line == f"option {option!r} of {kind} was moved; give {pair.new}"


def test_a_saved_config_with_a_moved_option_is_refused(command_line, tiny_run, tmp_path, capsys):
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    config["model"]["class_path"] = "lightning_modules.BoosterModule"
    config["model"]["init_args"] |= {"lam": 2.0, "alpha": 0.05, "refresh_every": 4}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as left:
        command_line("fit", f"--config={tmp_path / 'old.yaml'}")
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: option 'refresh_every' of BoosterModule was moved; give"
        " HeldBoosterModule.refresh_every with configs/objective/held_booster.yaml\n"
    )


def test_an_option_of_another_class_is_not_said_to_have_moved(refused):
    line = refused("--model.init_args.refresh_every=4")
    assert "'refresh_every'" in line
    assert "moved" not in line


def test_the_changelog_has_the_table():
    text = (ROOT / "CHANGELOG.md").read_text()
    section = text.partition("### Renamed\n")[2].partition("\n### ")[0]
    assert section.endswith(as_markdown())
