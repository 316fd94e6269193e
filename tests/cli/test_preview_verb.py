"""``python train.py preview``: without weights, without a device, without a trace in the run
folder.
"""

import pytest

PAIRS = (
    "--config=configs/objective/dpo.yaml",
    "--config=configs/model/tiny.yaml",
    "--config=configs/data/preference.yaml",
)


def test_the_streams_of_the_objective_are_shown(temper, tmp_path, capsys):
    temper("preview", tmp_path / "run", "--limit=64", "--rows=1", data="attack")
    text = capsys.readouterr().out
    assert "SyntheticAttack for SFTModule" in text
    assert (
        "10 rows in a pass: 2 x 5" in text
        and "evaluation (B) against user (A): 0 of 12 rows are in both sets" in text
    )
    assert text.count("\nrow ") == 1 + 3, "one row of the stream, one prompt of each of three kinds"
    assert not (tmp_path / "run").exists()


def test_no_weights_are_loaded_and_no_model_needs_to_be_there(
    temper, tmp_path, monkeypatch, capsys
):
    import lightning_modules.base

    monkeypatch.setattr(lightning_modules.base, "build_network", None)
    temper("preview", tmp_path / "run", "--limit=64", model=tmp_path / "nowhere")
    assert "SyntheticInstruct for SFTModule" in capsys.readouterr().out


def test_what_the_config_asks_of_a_device_does_not_matter(temper, tmp_path, capsys):
    temper(
        "preview",
        tmp_path / "run",
        "--limit=64",
        "--trainer.accelerator=cuda",
        "--trainer.devices=8",
        "--trainer.precision=16-mixed",
    )
    assert "SyntheticInstruct for SFTModule" in capsys.readouterr().out


def test_the_page_is_written_where_it_was_asked_for(temper, tmp_path, capsys):
    temper(
        "preview", tmp_path / "run", "--limit=64", f"--html={tmp_path / 'page.html'}", "--rows=0"
    )
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert f"written to {tmp_path / 'page.html'}" in capsys.readouterr().out


def test_every_stream_is_shown_by_its_own_name(command_line, capsys):
    command_line(
        "preview",
        *PAIRS,
        "--data.init_args.preset=tiny",
        "--data.init_args.n_pairs=70",
        "--data.init_args.n_eval=2",
        "--rows=1",
    )
    text = capsys.readouterr().out
    assert (
        "SyntheticPreference for DPOModule" in text and "chosen: " in text and "rejected: " in text
    )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--rows=-1"], "--rows=-1: give a whole number >= 0"),
        (["--limit=0"], "--limit=0: give a whole number >= 1"),
        (
            ["--config=configs/objective/booster.yaml"],
            "model=BoosterModule reads the stream 'alignment', and data=SyntheticInstruct has",
        ),
        (["--data.init_args.n_eval=0"], "data.init_args.n_eval=0"),
        (["--row=3"], "unknown option 'row'"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(refused, words, found):
    assert found in refused(*words, verb="preview")
