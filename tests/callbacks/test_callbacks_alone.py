"""Every callback works alone, from YAML by its short name or from an installed package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import callbacks

ROOT = Path(__file__).parents[2]
PRODUCTS = {
    "SafetyEvaluation": "evaluation.json",
    "RunCard": "card.json",
    "HFExport": "export/config.json",
    "Throughput": "throughput/tokens_per_second",
    "ProbeLoss": "probe/harmful_loss",
    "ForcedPrefix": "forced_prefix.json",
    "RefusalAblation": "refusal_ablation.json",
    "UnlearningEvaluation": "unlearning.json",
    "UtilityEvaluation": "utility.json",
}
ARGUMENTS = {
    "Throughput": ", init_args: {every_n_steps: 1}",
    "UtilityEvaluation": ", init_args: {tasks: [letters], include_path: tests/callbacks/letters}",
}


def _products(folder: Path) -> set[str]:
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    return {
        product
        for product in PRODUCTS.values()
        if product in columns or (folder / product).exists()
    }


def test_every_callback_of_the_project_is_known_here():
    # These leave no file of their own in a fit.
    silent = {"Preemption", "SafetySteering", "SampleGenerations", "SaveAnswers", "StartChecks"}
    assert set(PRODUCTS) | silent == set(callbacks.__all__)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_callback_works_alone_from_yaml(temper, tmp_path, name):
    if name == "UtilityEvaluation":
        pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text(
        f"trainer: {{callbacks: [{{class_path: {name}{ARGUMENTS.get(name, '')}}}]}}\n"
    )
    data = {"UnlearningEvaluation": "alignment"}.get(name, "attack")  # it needs rows to retain
    temper("fit", tmp_path, data=data, trainer=["configs/trainer/cpu.yaml", tmp_path / "own.yaml"])
    assert _products(tmp_path) == {PRODUCTS[name]}


def test_a_fit_without_any_callback_trains(temper, tmp_path):
    temper("fit", tmp_path, "--trainer.callbacks=null")
    assert _products(tmp_path) == set()
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_callback_of_an_installed_package_is_used(tmp_path, tiny_command):
    source = tmp_path / "source"
    site = tmp_path / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend ='
        ' "setuptools.build_meta"\n[project]\nname = "temper-plugin-probe"\nversion ='
        ' "1"\n[project.entry-points."lightning.pytorch.callbacks_factory"]\nprobe ='
        ' "temper_plugin_probe:make"\n[tool.setuptools]\npy-modules = ["temper_plugin_probe"]\n'
    )
    (source / "temper_plugin_probe.py").write_text(
        "import lightning.pytorch as L\n"
        "class Fired(L.Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        print('the plugin saw step', trainer.global_step)\n"
        "def make():\n"
        "    return [Fired()]\n"
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", site, source], check=True, timeout=300)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = tiny_command("fit", tmp_path / "run", "--trainer.max_steps=1")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the plugin saw step 1" in done.stdout
    assert (tmp_path / "run" / "export" / "config.json").exists(), (
        "the project's own callbacks are used too"
    )
