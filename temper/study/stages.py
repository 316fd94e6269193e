"""What each stage of a study runs, and where its files go.

pretrain -> instruct -> align/<objective> -> attack/<objective>/<attack>/p<ratio>
"""

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

TRAINER = "configs/trainer/cpu.yaml"
# Folders whose code can change a stage's figures; the report's cannot.
TRAINING_CODE = (
    "train.py", "lightning_modules", "datamodules", "callbacks", "strategies",
    "temper/cli", "temper/data", "temper/judges", "temper/losses", "temper/metrics", "temper/models",
    "temper/synthetic", "temper/schedules.py", "configs",
)  # fmt: skip


def stage_folder(runs: str, seed: str, stage: str) -> str:
    """Run folder of a stage, such as ``runs/demo/seed0/align/booster``."""
    return f"{runs}/seed{seed}/{stage}"


def fit_command(study: dict[str, Any], folder: str, seed: str, kind: str, model: str | None = None, **names: str) -> str:
    """The ``train.py fit`` command of a stage, as one would type it.

    Args:
        study: Settings from `load_study`.
        folder: Run folder of the stage.
        seed: Seed of weights, rows and order.
        kind: ``pretrain``, ``instruct``, ``align`` or ``attack``.
        model: Exported model to start from; None builds one.
        names: ``objective``, for an attack also ``attack`` and ``ratio``.
    """
    part = study[kind]
    configs = [study.get("trainer", TRAINER), *part.get("config", [])]
    settings: dict[str, Any] = dict(part.get("set", {}))
    extra: dict[str, Any] = {}
    if kind == "align":
        extra = study["objectives"][names["objective"]]
    elif kind == "attack":
        extra = study["attacks"][names["attack"]]
        settings["model.init_args.optimizer.init_args.lr"] = extra["lr"]
        settings["trainer.max_steps"] = extra["steps"]
        settings["data.init_args.harmful_ratio"] = names["ratio"]
    configs += extra.get("config", [])
    settings |= extra.get("set", {})
    settings |= {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "trainer.default_root_dir": folder,
        "trainer.val_check_interval": settings["trainer.max_steps"],
    }
    settings["model.init_args.network.path" if model else "model.init_args.network.shape.seed"] = model or seed
    words = [sys.executable, "train.py", "fit"]
    words += [word for config in configs for word in ("--config", config)]
    words += [f"--{key}={_plain(value)}" for key, value in settings.items()]
    return shlex.join(words)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def report_inputs(study: dict[str, Any], runs: str) -> list[str]:
    """``evaluation.json`` of every stage that the report reads."""
    stages = ["instruct", *(f"align/{name}" for name in study["objectives"])]
    stages += [
        f"attack/{objective}/{attack}/p{ratio:g}"
        for objective in study["objectives"]
        for attack in study["attacks"]
        for ratio in study["harmful_ratios"]
    ]
    return [f"{stage_folder(runs, seed, stage)}/evaluation.json" for seed in study["seeds"] for stage in stages]


def code_hash() -> str:
    """Hash of the code and configs that a figure can depend on: a change makes stages run again."""
    digest = hashlib.sha256()
    for place in map(Path, TRAINING_CODE):
        for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in (".py", ".yaml")):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
