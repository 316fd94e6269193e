"""Small files that compose; the resolved config stays in the run folder."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Tasks of lm-eval are no settings of ours.
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "lm_eval"
)
LAYERS = {"trainer": "cpu", "objective": "sft", "model": "tiny", "data": "alignment"}


def _assert_holds(found: Any, asked: Any, where: str = "") -> None:
    """Everything a file asks for is in the resolved config."""
    if isinstance(asked, dict):
        for key, value in asked.items():
            if key.endswith("+"):
                assert len(found[key[:-1]]) > len(value), f"{where}.{key} replaced what was there"
                _assert_holds(found[key[:-1]][-len(value) :], value, f"{where}.{key}")
            elif key == "class_path":
                assert found[key].rsplit(".", 1)[-1] == value.rsplit(".", 1)[-1], where
            else:
                _assert_holds(found[key], value, f"{where}.{key}")
    elif isinstance(asked, list):
        assert len(found) == len(asked), where
        for one, other in zip(found, asked, strict=True):
            _assert_holds(one, other, where)
    else:
        assert found == asked, f"{where}: {found} instead of {asked}"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_of_the_project_composes(config, print_config, tmp_path):
    kind = Path(config).parts[1]
    layers = [f"configs/{layer}/{name}.yaml" for layer, name in LAYERS.items()]
    resolved = print_config(
        [*layers, config] if kind not in LAYERS else _with(layers, kind, config)
    )
    _assert_holds(resolved, yaml.safe_load((ROOT / config).read_text()), config)
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(resolved))
    assert print_config([str(tmp_path / "printed.yaml")]) == resolved


def _with(layers: list[str], kind: str, config: str) -> list[str]:
    """The layers with the one of this kind replaced. What only adds to another file comes after
    that file, whose name it begins with.
    """
    text = (ROOT / config).read_text()
    if "+:" in text:
        return [*layers, config]
    replaced = [config]
    if (
        kind in ("objective", "data")
        and "class_path" not in yaml.safe_load(text)[{"objective": "model"}.get(kind, kind)]
    ):
        replaced = [
            max((c for c in CONFIGS if config.startswith(c.removesuffix(".yaml") + "_")), key=len),
            config,
        ]
    return [c for layer in layers for c in (replaced if Path(layer).parts[1] == kind else [layer])]


def test_a_later_config_file_overrides_only_the_keys_it_has(temper, tmp_path):
    for name, text in {"a": "max_steps: 3, log_every_n_steps: 7", "b": "max_steps: 1"}.items():
        (tmp_path / f"{name}.yaml").write_text(f"trainer: {{{text}}}\n")
    temper(
        "fit",
        tmp_path / "run",
        f"--config={tmp_path / 'a.yaml'}",
        f"--config={tmp_path / 'b.yaml'}",
    )
    trainer = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]
    assert (trainer["max_steps"], trainer["log_every_n_steps"]) == (1, 7)


def test_a_flag_after_the_files_wins(temper, tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_steps: 3}\n")
    temper("fit", tmp_path / "run", f"--config={tmp_path / 'a.yaml'}", "--trainer.max_steps=1")
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 1
    )


def test_the_environment_sets_what_no_flag_does(print_config, monkeypatch):
    monkeypatch.setenv("TEMPER_FIT__TRAINER__MIN_STEPS", "5")
    configs = [f"configs/{layer}/{name}.yaml" for layer, name in LAYERS.items()]
    assert print_config(configs)["trainer"]["min_steps"] == 5
    assert print_config(configs, "--trainer.min_steps=6")["trainer"]["min_steps"] == 6


def test_the_saved_config_makes_the_same_run_again(command_line, tiny_run, tmp_path):
    command_line(
        "fit", f"--config={tiny_run / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}"
    )
    weights = [folder / "export" / "model.safetensors" for folder in (tiny_run, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_same_settings_again_leave_the_saved_config_alone(temper, tmp_path):
    temper("fit", tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    temper("fit", tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before
    assert [path.name for path in tmp_path.glob("config*")] == ["config.yaml"]


def test_other_settings_keep_the_config_of_the_run_before(temper, tmp_path):
    for steps in (1, 2, 3):
        temper("fit", tmp_path, f"--trainer.max_steps={steps}")
    steps = {
        path.name: yaml.safe_load(path.read_text())["trainer"]["max_steps"]
        for path in tmp_path.glob("config*")
    }
    assert steps == {"config.1.yaml": 1, "config.2.yaml": 2, "config.yaml": 3}


def test_a_validation_keeps_the_config_of_the_training(temper, tmp_path):
    temper("fit", tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    temper("validate", tmp_path, model=tmp_path / "export")
    assert (tmp_path / "config.yaml").read_text() == before
    saved = yaml.safe_load((tmp_path / "config_validate.yaml").read_text())
    assert saved["model"]["init_args"]["network"]["path"] == str(tmp_path / "export")


def test_without_a_logger_metrics_go_into_the_run_folder(tiny_run):
    assert (tiny_run / "metrics.csv").read_text().splitlines()[0].count("loss/instruct") == 1
    assert not (tiny_run / "lightning_logs").exists()
