"""Peak memory of whole fits, each in its own process, against `plan` of the same command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Width, layers, inner width, rows of a step.
SIZES = {
    "small": (128, 3, 352, 8),
    "middle": (256, 4, 704, 16),
    "weights dominate": (384, 6, 1024, 4),
}


def _words(folder: Path, objective: str, size: str, *more: str) -> list[str]:
    width, layers, inner, rows = SIZES[size]
    shape = {
        "hidden_size": width,
        "n_layers": layers,
        "n_heads": width // 32,
        "intermediate_size": inner,
    }
    configs = ("trainer/cpu", f"objective/{objective}", "model/tiny", "data/alignment")
    return [
        *(f"--config=configs/{name}.yaml" for name in configs),
        *(f"--model.init_args.network.shape.{name}={value}" for name, value in shape.items()),
        "--data.init_args.preset=paper",
        "--data.init_args.n_alignment=128",
        "--data.init_args.n_harmful=64",
        "--data.init_args.n_eval=2",
        f"--data.init_args.batch_size={rows}",
        f"--data.init_args.harmful_batch_size={rows}",
        "--model.init_args.packing=false",
        "--trainer.max_steps=2",
        "--trainer.callbacks=null",
        f"--trainer.default_root_dir={folder}",
        *more,
    ]


def _compared(
    folder: Path, command_line: Callable[..., None], objective: str, size: str, *more: str
) -> tuple[int, int]:
    """Planned and measured bytes."""
    words = _words(folder / "run", objective, size, *more)
    worker = [sys.executable, str(Path(__file__).parent / "memory_worker.py"), "fit", *words]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    command_line("plan", *words, f"--json={folder / 'plan.json'}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    return json.loads((folder / "plan.json").read_text())["memory"]["peak"], int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("objective", ["sft", "booster"])
def test_a_fit_takes_the_planned_memory(
    objective: str, size: str, tmp_path: Path, command_line: Callable[..., None]
):
    planned, measured = _compared(tmp_path, command_line, objective, size)
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--model.init_args.network.activation_checkpointing=true",),
        ("--model.init_args.network.lora.rank=8",),
        ("--model.init_args.micro_batch_size=4",),
        ("--trainer.precision=bf16-mixed",),
        ("--trainer.precision=bf16-true",),
    ],
    ids=lambda words: words[0].rpartition(".")[2],
)
def test_booster_with_options_takes_the_planned_memory(
    more: tuple[str, ...], tmp_path: Path, command_line: Callable[..., None]
):
    planned, measured = _compared(tmp_path, command_line, "booster", "middle", *more)
    assert planned == pytest.approx(measured, rel=0.15)
