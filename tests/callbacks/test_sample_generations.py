"""Answers logged as text: always the same harmless prompts, to every logger that takes text."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from callbacks.sample_generations import WRITERS, SampleGenerations, _cell, _markdown
from temper.errors import TemperError
from tests.callbacks.runs import read_generations


def _texts(folder: Path) -> list[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [
        event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("generations/text_summary")
    ]


def _fit(temper, folder: Path, *words: str, **arguments: object) -> list[str]:
    pytest.importorskip("tensorboard")
    folder.mkdir()
    own = folder.parent / "own.yaml"
    own.write_text(
        json.dumps(
            {
                "trainer": {
                    "callbacks+": [{"class_path": "SampleGenerations", "init_args": arguments}]
                }
            }
        )
    )
    temper("fit", folder, f"--config={own}", *words, data="attack")
    return _texts(folder)


def test_the_first_answers_of_every_harmless_kind_are_logged(temper, tmp_path):
    texts = _fit(temper, tmp_path / "run", n=2)
    rows = read_generations(tmp_path / "run")
    expected = [
        row for kind in ("safe", "task") for row in [row for row in rows if row["kind"] == kind][:2]
    ]
    table = [f"| {row['kind']} | `{row['prompt']}` | `{row['response']}` |" for row in expected]
    assert len(texts) == 1 and texts[0].splitlines()[2:] == table and len(table) == 4


def test_unsafe_answers_are_logged_only_with_show_unsafe(temper, tmp_path):
    assert "unsafe" not in _fit(temper, tmp_path / "one")[0]
    assert "| unsafe | " in _fit(temper, tmp_path / "two", show_unsafe=True)[0]


def test_every_validation_logs_the_same_prompts(temper, tmp_path):
    texts = _fit(
        temper,
        tmp_path / "run",
        "--trainer.val_check_interval=1",
        "--data.init_args.eval_batch_size=3",
    )
    prompts = [[line.split("|")[2] for line in text.splitlines()[2:]] for text in texts]
    assert len(prompts) == 2 and prompts[0] == prompts[1] and len(prompts[0]) == 8


def test_data_with_unsafe_prompts_alone_are_refused(temper, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _fit(temper, tmp_path / "run", "--data.init_args.eval_kinds=[UNSAFE]")
    assert "SampleGenerations.show_unsafe=false" in capsys.readouterr().err


def test_less_than_one_prompt_is_refused():
    with pytest.raises(TemperError, match=r"SampleGenerations.n=0"):
        SampleGenerations(n=0)


def test_a_missing_text_logger_is_warned_about(temper, tmp_path):
    folder = tmp_path / "run"
    csv = f"{{class_path: CSVLogger, init_args: {{save_dir: {folder}, name: '', version: ''}}}}"
    (tmp_path / "own.yaml").write_text(
        f"trainer: {{callbacks+: [{{class_path: SampleGenerations}}], logger: {csv}}}\n"
    )
    with pytest.warns(UserWarning, match="SampleGenerations.*logger"):
        temper("fit", folder, f"--config={tmp_path / 'own.yaml'}", data="attack")


def test_wandb_gets_a_table_and_mlflow_an_artifact(monkeypatch):
    calls = []
    wandb = object.__new__(WandbLogger)
    mlflow = object.__new__(MLFlowLogger)
    monkeypatch.setattr(
        WandbLogger, "log_text", lambda self, *args, **kwargs: calls.append((args, kwargs))
    )
    experiment = SimpleNamespace(log_text=lambda *args: calls.append(args))
    monkeypatch.setattr(MLFlowLogger, "experiment", experiment)
    monkeypatch.setattr(MLFlowLogger, "run_id", "abc")
    rows = [["safe", "Soup?", "Stir."]]
    for logger in (wandb, mlflow):
        for kind, write in WRITERS:
            if isinstance(logger, kind):
                write(logger, rows, 7)
    assert calls == [
        (("generations",), {"columns": ["kind", "prompt", "answer"], "data": rows, "step": 7}),
        ("abc", _markdown(rows), "generations/step_000007.md"),
    ]


def test_no_text_breaks_out_of_its_cell():
    assert _cell("a`|b\nc") == "`a'\\|b ↵ c`"
