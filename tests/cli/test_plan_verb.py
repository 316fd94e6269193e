"""``python train.py plan``: every shipped config, without weights, files, a device or a trace in
the run folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
GPUS = ("--trainer.accelerator=gpu", "--trainer.devices=8")
BOOSTER = (
    "--config=configs/trainer/cpu.yaml",
    "--config=configs/objective/booster.yaml",
    "--config=configs/model/llama2_7b.yaml",
)
TEXT = ("--config=configs/data/text_alignment.yaml", "--data.init_args.max_length=512")


@pytest.fixture
def plan(command_line, tmp_path: Path):
    """Run the verb; returns what it writes as JSON."""

    def run(*words: str) -> dict[str, Any]:
        command_line(
            "plan",
            *words,
            f"--json={tmp_path / 'plan.json'}",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
        )
        assert not (tmp_path / "run").exists()
        return json.loads((tmp_path / "plan.json").read_text())

    return run


@pytest.mark.parametrize("config", MODELS, ids=lambda path: path.stem)
def test_every_model_config_has_a_plan(config: Path, plan):
    data = "alignment" if config.stem in ("tiny", "small") else "text_alignment"
    trainer = "configs/trainer/cpu.yaml"
    objective = "configs/objective/booster.yaml"
    found = plan(
        *(f"--config={name}" for name in (trainer, objective, config, f"configs/data/{data}.yaml"))
    )
    assert found["parameters"] > found["trainable"] > 0 or config.stem in ("tiny", "small")
    assert found["memory"]["peak"] > 0 and found["flops_per_step"] > 0
    assert found["setup"]["sequence_length"] == (1024 if data == "text_alignment" else 25)


@pytest.mark.parametrize("model", ["llama2_7b", "llama3_8b"])
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_has_a_plan(config: Path, model: str, plan):
    words = (f"--config={config}", f"--config=configs/model/{model}.yaml", "--devices_total=8")
    assert plan(*words)["memory"]["peak"] > 0


def test_what_the_other_verbs_would_run_on_is_planned(plan):
    found = plan(
        *BOOSTER,
        *TEXT,
        *GPUS,
        "--trainer.strategy=fsdp2",
        "--trainer.precision=bf16-mixed",
        "--trainer.num_nodes=2",
    )["setup"]
    assert (found["strategy"], found["devices"], found["precision"], found["on_cpu"]) == (
        "fsdp2",
        16,
        "bf16-mixed",
        False,
    )
    assert (
        found["batch_sizes"] == {"any": 16, "harmful": 16, "alignment": 16}
        and found["sequence_length"] == 512
    )


def test_options_of_a_strategy_are_read(plan):
    found = plan(
        *BOOSTER,
        *TEXT,
        *GPUS,
        "--trainer.strategy=strategies.ZeROStrategy",
        "--trainer.strategy.init_args.stage=3",
        "--trainer.strategy.init_args.offload_optimizer=true",
        "--trainer.strategy.init_args.offload_parameters=true",
    )
    assert found["setup"]["strategy"] == "zero3" and found["memory"]["host"] > 0
    assert plan(*BOOSTER, *TEXT, *GPUS)["setup"]["strategy"] == "ddp", (
        "what Lightning takes for several devices"
    )


def test_the_table_names_the_shape_what_fits_and_advice(plan, capsys):
    plan(*BOOSTER, *TEXT, "--device_gib=12", "--tflops=100", "--mfu=0.5")
    text = " ".join(capsys.readouterr().out.split())
    assert "published numbers of meta-llama/Llama-2-7b-hf" in text
    assert "25,165,824 of 6,763,581,440 parameters are trained" in text
    assert (
        "Does not fit" in text
        and "model.init_args.network.quantization=nf4" in text
        and "50% of 100 TFLOP/s" in text
    )
    plan(*BOOSTER, *TEXT)
    assert "Fits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--device_gib=0"], "--device_gib=0.0: give a number > 0"),
        (["--devices_total=-1"], "--devices_total=-1: give a number > 0"),
        (["--trainer.accelerator=gpu", "--trainer.devices=auto"], "give --devices_total=8"),
        (["--trainer.precision=16-mixed"], "use 32-true, bf16-mixed or bf16-true"),
        (["--trainer.strategy=fsdp"], "trainer.strategy=fsdp: no plan is known for it"),
        (["--model.init_args.network.path=nobody/nothing"], "both of path and shape"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(refused, words, found):
    assert found in refused(*words, verb="plan")


def test_stored_answers_are_nothing_to_train(tmp_path, command_line, capsys):
    (tmp_path / "generations.jsonl").write_text('{"id": 0, "prompt": "a", "response": "b"}\n')
    with pytest.raises(SystemExit):
        command_line(
            "plan",
            "--model=StoredAnswers",
            f"--model.init_args.path={tmp_path}",
            "--config=configs/data/instruct.yaml",
        )
    assert "model=StoredAnswers does not say what a step costs" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_refused_with_the_way_out(command_line, capsys):
    words = ("--config=configs/trainer/cpu.yaml", "--config=configs/objective/sft.yaml", *TEXT)
    with pytest.raises(SystemExit):
        command_line("plan", *words, "--model.init_args.network.path=nobody/nothing")
    line = capsys.readouterr().err
    assert "model.init_args.network.path=nobody/nothing" in line and "the hub's cache" in line
