"""Invalid settings are refused in one line that names the flag, the value and the way out, before
any training.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "wrong", "meant"),
    [
        (["--trainer.max_stps=3"], "trainer.max_stps", "'trainer.max_steps'"),
        (["--model.init_args.max_grad_nrom=3"], "max_grad_nrom", "'max_grad_norm'"),
        (["--data.init_args.n_evl=3"], "n_evl", "'n_eval'"),
        (["--model.init_args.network.pth=x"], "network.pth", "'network.path'"),
        (["--model=BosterModule"], "BosterModule", "'BoosterModule'"),
        (["--data=SyntheticAtack"], "SyntheticAtack", "'SyntheticAttack'"),
        (["--trainer.callbacks+=ProbLoss"], "ProbLoss", "'ProbeLoss'"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(refused, words, wrong, meant):
    line = refused(*words)
    assert repr(wrong) in line and "did you mean" in line and meant in line


def test_an_unknown_key_in_a_file_gets_a_suggestion(refused, tmp_path):
    (tmp_path / "own.yaml").write_text("trainr: {max_steps: 3}\n")
    line = refused(f"--config={tmp_path / 'own.yaml'}")
    assert "'trainr.max_steps'" in line and "'trainer.max_steps'" in line


def test_an_option_of_another_class_is_not_suggested_for_itself(refused):
    line = refused("--model.init_args.lam=3")
    assert "'lam'" in line and "did you mean" not in line and "chosen here" in line


def test_an_unknown_verb_gets_a_suggestion(refused):
    line = refused(verb="validte")
    assert "'validte'" in line and "did you mean 'validate'" in line and "'predict'" in line


@pytest.mark.parametrize("flag", ["trainer.max_epoch", "trainer.max_s", "trainer.accum"])
def test_a_flag_is_never_abbreviated(refused, flag):
    line = refused(f"--{flag}=3")
    assert repr(flag) in line and "not abbreviated" in line


@pytest.mark.parametrize(
    ("flag", "value", "instead"),
    [
        ("trainer.gradient_clip_val", "0.5", "--model.init_args.max_grad_norm=0.5"),
        ("trainer.gradient_clip_algorithm", "value", "--model.init_args.max_grad_norm"),
        ("trainer.accumulate_grad_batches", "4", "--model.init_args.micro_batch_size"),
        ("trainer.precision", "16-mixed", "bf16-mixed"),
        ("trainer.strategy", "fsdp", "did you mean 'fsdp2'?"),
        ("trainer.strategy", "fsdp", "auto, ddp"),
        ("trainer.strategy", "deepspeed", "auto, ddp"),
        ("trainer.strategy", "deepspeed_stage_3", "did you mean 'zero3'?"),
    ],
)
def test_an_unsupported_trainer_option_names_an_alternative(refused, flag, value, instead):
    line = refused(f"--{flag}={value}")
    assert f"{flag}={value}" in line and instead in line


def test_a_missing_config_file_gets_a_suggestion(refused):
    line = refused("--config=configs/model/tyni.yaml")
    assert "--config=configs/model/tyni.yaml" in line and "'configs/model/tiny.yaml'" in line


def test_a_file_that_is_not_yaml_is_refused(refused, tmp_path):
    (tmp_path / "own.yaml").write_text("model: [unclosed\n")
    assert "config" in refused(f"--config={tmp_path / 'own.yaml'}")


def test_a_missing_model_folder_is_named(refused, tmp_path):
    line = refused(model=tmp_path / "nowhere")
    assert (
        f"model.init_args.network.path={tmp_path / 'nowhere'}" in line
        and "no such folder" in line
        and "export/" in line
    )


def test_a_folder_without_a_model_is_named(refused, tmp_path):
    line = refused(model=tmp_path)
    assert (
        f"model.init_args.network.path={tmp_path}" in line
        and "config.json" in line
        and "export/" in line
    )


def test_a_path_and_a_shape_together_are_refused(refused, tiny_run):
    line = refused(f"--model.init_args.network.path={tiny_run / 'export'}")
    assert (
        "model.init_args.network" in line
        and "both of path and shape" in line
        and "exactly one" in line
    )


def test_a_checkpoint_that_does_not_exist_is_named(refused):
    line = refused("--ckpt_path=/nowhere/last.ckpt")
    assert "ckpt_path=/nowhere/last.ckpt" in line and "drop the flag" in line


@pytest.mark.parametrize(
    ("words", "found", "way_out"),
    [
        (["--data.init_args.harmful_ratio=1.5"], "data.init_args.harmful_ratio=1.5", "[0, 1]"),
        (["--data.init_args.harmful_ratio=-0.1"], "data.init_args.harmful_ratio=-0.1", "[0, 1]"),
        (
            ["--data.init_args.harmful_ratio=0.17"],
            "data.init_args.harmful_ratio=0.17",
            "harmful_ratio=0.2",
        ),
        (["--data.init_args.n_rows=0"], "data.init_args.n_rows=0", "at least 1"),
        (["--data.init_args.n_eval=0"], "data.init_args.n_eval=0", "at least 1"),
        (["--data.init_args.preset=tinny"], "preset='tinny'", "tiny, small, paper"),
        (["--data.init_args.batch_size=50"], "50", "10 rows"),
        (
            [
                "--data.init_args.split=test",
                "--data.init_args.n_rows=200",
                "--data.init_args.n_eval=20",
            ],
            "eval_split='test'",
            "different splits",
        ),
    ],
)
def test_data_that_make_no_sense_are_refused(refused, words, found, way_out):
    line = refused(*words, data="attack")
    assert found in line and way_out in line


@pytest.mark.parametrize("flag", ["max_grad_norm", "micro_batch_size"])
def test_a_size_that_is_not_positive_is_refused(refused, flag):
    line = refused(f"--model.init_args.{flag}=-1")
    assert f"model.init_args.{flag}=-1" in line and "null for none" in line


def test_data_without_the_stream_of_the_objective_are_refused(refused):
    line = refused("--config=configs/objective/booster.yaml")
    assert (
        "model=BoosterModule" in line and "data=SyntheticInstruct" in line and "'alignment'" in line
    )


def test_a_model_with_another_vocabulary_is_refused(refused, tiny_run):
    line = refused("--data.init_args.preset=small", model=tiny_run / "export")
    assert f"model.init_args.network.path={tiny_run / 'export'}" in line
    assert "25 tokens" in line and "36 tokens" in line and "data.init_args.preset" in line


def test_a_tokenizer_without_a_pad_token_is_refused(refused, monkeypatch):
    from datamodules import synthetic

    def no_padding(spec):
        tokenizer = build(spec)
        tokenizer.pad_token = None
        return tokenizer

    build = synthetic.build_tokenizer
    monkeypatch.setattr(synthetic, "build_tokenizer", no_padding)
    line = refused()
    assert "no pad token" in line and "tokenizer.pad_token = tokenizer.eos_token" in line


def test_a_bug_is_not_reported_as_an_invalid_setting(temper, tmp_path, monkeypatch):
    from datamodules import SyntheticInstruct

    def broken(self, stage):
        raise ValueError("a bug")

    monkeypatch.setattr(SyntheticInstruct, "setup", broken)
    with pytest.raises(ValueError, match="a bug"):
        temper("fit", tmp_path)


@pytest.mark.slow
def test_a_refusal_of_the_real_command_has_no_traceback(tmp_path):
    words = [
        "--config=configs/objective/sft.yaml",
        "--config=configs/model/tiny.yaml",
        "--config=configs/data/attack.yaml",
    ]
    command = [
        sys.executable,
        "train.py",
        "fit",
        *words,
        "--data.init_args.harmful_ratio=2",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert done.stderr.splitlines()[-1].startswith("error: data.init_args.harmful_ratio=2")
