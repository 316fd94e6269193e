"""Configs that a cluster user starts from: the memory and time in their comments are those of
`plan`, and they make modules.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
DEVICES = {
    "one": ("--devices_total=1",),
    "four": ("--config=configs/trainer/fsdp2.yaml", "--devices_total=4"),
}
MODELS = ("llama2_7b", "llama3_8b")
PLANNED = r"{model}: on one GPU: ([\d.]+) GiB, ([\d.]+) s; on four: ([\d.]+) GiB each, ([\d.]+) s"
TRAINERS = [
    (),
    ("ddp",),
    ("fsdp2",),
    ("zero2",),
    ("zero3",),
    ("zero3_offload",),
    ("background_checkpoints",),
    ("ddp", "background_checkpoints"),
]


def test_there_is_one_experiment_for_each_objective():
    assert [path.stem for path in EXPERIMENTS] == ["booster", "dpo", "npo", "sft"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_memory_and_time_of_an_experiment_are_those_of_plan(
    config: Path, model: str, command_line, tmp_path: Path
):
    text = config.read_text()
    numbers = re.search(PLANNED.format(model=model), text).groups()
    memory_one, time_one, memory_four, time_four = map(float, numbers)
    command = f"--config configs/experiment/{config.name} --config configs/model/{MODELS[0]}.yaml"
    assert command in text, "the command in the comment"
    for name, memory, time in (("one", memory_one, time_one), ("four", memory_four, time_four)):
        out = tmp_path / f"{name}.json"
        command_line(
            "plan",
            "--config=configs/trainer/gpu.yaml",
            *DEVICES[name],
            f"--config={config}",
            f"--config={ROOT / 'configs' / 'model' / model}.yaml",
            f"--json={out}",
        )
        found = json.loads(out.read_text())
        assert found["memory"]["peak"] / 2**30 == pytest.approx(memory, abs=0.051)
        assert found["seconds_per_step"] == pytest.approx(time, abs=0.051)
        assert found["setup"]["sequence_length"] == 512
        assert set(found["setup"]["batch_sizes"].values()) == {16}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_and_a_model_keep_what_both_say(config: Path, model: str, command_line):
    out = io.StringIO()
    files = ("trainer/gpu", f"experiment/{config.stem}", f"model/{model}")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        command_line("fit", *(f"--config=configs/{file}.yaml" for file in files), "--print_config")
    arguments = yaml.safe_load(out.getvalue())["model"]["init_args"]
    named = yaml.safe_load((ROOT / "configs" / "model" / f"{model}.yaml").read_text())
    network = named["model"]["init_args"]["network"]
    assert arguments["network"]["path"] == network["path"]
    assert arguments["network"]["lora"]["targets"] == network["lora"]["targets"]
    # Memory of both models was planned with this.
    assert arguments["micro_batch_size"] == 4


@pytest.mark.parametrize("names", TRAINERS, ids="-".join)
@pytest.mark.parametrize("base", ["cpu", "gpu"])
def test_trainer_configs_compose(names: tuple[str, ...], base: str, command_line):
    files = [f"configs/trainer/{name}.yaml" for name in (base, *names)]
    others = [
        "configs/objective/booster.yaml",
        "configs/model/tiny.yaml",
        "configs/data/alignment.yaml",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
        command_line("fit", *(f"--config={file}" for file in (*files, *others)), "--print_config")
    assert left.value.code in (0, None)
    trainer = yaml.safe_load(out.getvalue())["trainer"]
    assert trainer["accelerator"] == base
    assert {callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]} >= {
        "SafetyEvaluation",
        "RunCard",
        "HFExport",
    }
    wanted = {
        "ddp": "ddp",
        "fsdp2": "FSDP2Strategy",
        "zero2": "ZeROStrategy",
        "zero3": "ZeROStrategy",
        "zero3_offload": "ZeROStrategy",
    }
    for name in names:
        if name in wanted:
            strategy = trainer["strategy"]
            assert (
                strategy if isinstance(strategy, str) else strategy["class_path"].rpartition(".")[2]
            ) == wanted[name]
            assert trainer["devices"] == "auto"
        else:
            assert trainer["plugins"][0]["class_path"] == (
                "temper.cli.checkpoint_io.BackgroundCheckpointIO"
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trainer.strategy=deepspeed_stage_3",), "did you mean 'zero3'?"),
        (("--trainer.strategy=fsdp",), "did you mean 'fsdp2'?"),
        (
            ("--trainer.strategy=fsdp2", "--config=configs/optimizer/adamw8bit.yaml"),
            "not shaped like the weights",
        ),
        (
            ("--trainer.strategy=zero2", "--config=configs/optimizer/adamw8bit.yaml"),
            "not shaped like the weights",
        ),
        (
            ("--trainer.strategy=zero3", "--config=configs/trainer/background_checkpoints.yaml"),
            "would be ignored",
        ),
        (
            (
                "--trainer.strategy=strategies.ZeROStrategy",
                "--trainer.strategy.init_args.offload_parameters=true",
            ),
            "zero2 keeps all weights",
        ),
    ],
)
def test_what_a_strategy_cannot_have_is_refused_in_one_line(
    words: tuple[str, ...], message: str, command_line, capsys
):
    files = ("trainer/cpu", "objective/booster", "model/tiny", "data/alignment")
    with pytest.raises(SystemExit) as left:
        command_line(
            "fit",
            *(f"--config=configs/{file}.yaml" for file in files),
            "--trainer.max_steps=1",
            *words,
        )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and said.startswith("error: ") and message in said
