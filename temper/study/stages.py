"""What each stage of a study runs, and where its files go.

pretrain -> instruct -> align/<objective> -> attack/<objective>/<attack>/p<ratio> (-> repair/...)

A study on a model that there is (``base_model``) has, in place of the first two, the model's
folder, the study's own files in ``data/`` if it makes some, and the base model's figures in
``base/``, the same for all seeds.
"""

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

from temper.study.settings import route

TRAINER = "configs/trainer/cpu.yaml"
SFT = "configs/objective/sft.yaml"  # any module serves to evaluate
# Folders whose code can change a stage's figures; the report's cannot.
TRAINING_CODE = (
    "train.py",
    "lightning_modules",
    "datamodules",
    "callbacks",
    "strategies",
    "temper/cli",
    "temper/data",
    "temper/edit",
    "temper/judges",
    "temper/losses",
    "temper/metrics",
    "temper/models",
    "temper/proxy",
    "temper/synthetic",
    "temper/schedules.py",
    "temper/checkpoint_file.py",
    "temper/sharded_checkpoint.py",
    "temper/ranks.py",
    "temper/slurm.py",
    "temper/run_folder.py",
    "configs",
)
REPORT_CODE = (
    "temper/report",
    "temper/study/report.py",
    "temper/study/settings.py",
    "temper/run_folder.py",
)


PLACES = ("base", "aligned", "data")


def stage_folder(runs: str, seed: str, stage: str) -> str:
    """Run folder of a stage, such as ``runs/demo/seed0/align/booster``."""
    return f"{runs}/seed{seed}/{stage}"


def fit_command(
    study: dict[str, Any], folder: str, seed: str, kind: str, model: str | None = None, **names: str
) -> str:
    """The ``train.py`` command of a stage, as one would type it.

    Args:
        study: Settings from `load_study`.
        folder: Run folder of the stage.
        seed: Seed of weights, rows and order.
        kind: ``pretrain``, ``instruct``, ``base_model`` (only evaluates), ``align``, ``edit`` (only
            evaluates, on the alignment's data), ``attack`` or ``repair``.
        model: Exported model to start from; None builds one.
        names: ``objective``, for an attack or a repair also ``attack`` and ``ratio``; for a repair
            also ``base`` and ``aligned``; and ``data``: the folders that ``{base}``, ``{aligned}``
            and ``{data}`` in settings stand for.
    """
    own = study["objectives"][names["objective"]] if "objective" in names else {}
    # Later parts win: what the stage has, then the attack, then the objective.
    parts = [study.get("align" if kind == "edit" else kind, {})]
    fixed: dict[str, Any] = {}
    verb = "fit"
    if kind == "align":
        parts.append(own)
    elif kind == "attack":
        attack = study["attacks"][names["attack"]]
        parts += [attack, own.get("attack", {})]
        fixed = {
            "model.init_args.optimizer.init_args.lr": attack["lr"],
            "trainer.max_steps": attack["steps"],
            "data.init_args.harmful_ratio": names["ratio"],
        }
    elif kind in ("edit", "base_model"):
        parts.append({"config": [SFT]})
        verb = "validate"
    elif kind == "repair":
        parts.append(own["repair"])
        verb = own["repair"].get("verb", "fit")
    configs = [
        study.get("trainer", TRAINER),
        *(config for part in parts for config in part.get("config", [])),
    ]
    settings: dict[str, Any] = dict(parts[0].get("set", {})) | fixed
    for part in parts[1:]:
        settings |= part.get("set", {})
    settings = {key: _filled(value, names) for key, value in settings.items()}
    settings |= {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "trainer.default_root_dir": folder,
    }
    if verb == "fit":
        settings["trainer.val_check_interval"] = settings["trainer.max_steps"]
    settings["model.init_args.network.path" if model else "model.init_args.network.shape.seed"] = (
        model or seed
    )
    words = [sys.executable, "train.py", verb]
    words += [word for config in configs for word in ("--config", config)]
    words += [f"--{key}={_plain(value)}" for key, value in settings.items()]
    return shlex.join(words)


def _filled(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, str):
        for place in PLACES:
            value = value.replace("{" + place + "}", places.get(place, ""))
    return value


def prepare_command(study: dict[str, Any], folder: str) -> str:
    """The command that makes a study's own files; ``{model}`` and ``{data}`` in it are the base
    model and the files' folder.
    """
    base = study["base_model"]
    words = [
        str(word).replace("{model}", base["path"]).replace("{data}", folder)
        for word in base["prepare"]
    ]
    return shlex.join([sys.executable, *words])


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def edit_command(
    study: dict[str, Any],
    folder: str,
    seed: str,
    base: str,
    aligned: str,
    objective: str,
    **places: str,
) -> str:
    """Edit an aligned model and evaluate the result: ``temper.edit ... && train.py validate ...``.

    Args:
        study: Settings from `load_study`.
        folder: Run folder of the edited model.
        seed: Seed of the evaluation prompts.
        base: Exported model before alignment.
        aligned: Exported aligned model.
        objective: Key of the objective that has ``edit``.
        places: See `fit_command`.
    """
    verb, *flags = map(str, study["objectives"][objective]["edit"])
    edit = [
        sys.executable,
        "-m",
        "temper.edit",
        verb,
        "--base",
        base,
        "--aligned",
        aligned,
        "--out",
        f"{folder}/export",
        *flags,
    ]
    return (
        shlex.join(edit)
        + " && "
        + fit_command(
            study, folder, seed, "edit", f"{folder}/export", objective=objective, **places
        )
    )


def report_inputs(study: dict[str, Any], runs: str) -> list[str]:
    """``evaluation.json`` of every stage that the report reads."""
    routes = [route(study["objectives"], name) for name in study["objectives"]]
    base = [] if "base_model" in study else ["instruct"]
    stages = [*base, *(each.aligned[-1] for each in routes)]
    stages += [
        each.attacked(attack, ratio)[-1]
        for each in routes
        for attack in study["attacks"]
        for ratio in study["harmful_ratios"]
    ]
    folders = [
        stage_folder(runs, seed, stage)
        for seed in study["seeds"]
        for stage in dict.fromkeys(stages)
    ]
    return [f"{folder}/evaluation.json" for folder in ([] if base else [f"{runs}/base"]) + folders]


def code_hash() -> str:
    """Hash of the code and configs that a figure can depend on: a change makes stages run again."""
    return _hash(TRAINING_CODE)


def report_hash() -> str:
    """Hash of the code that makes tables and reports of finished stages: a change makes them
    anew.
    """
    return _hash(REPORT_CODE)


def _hash(places: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for place in map(Path, places):
        for path in (
            [place]
            if place.is_file()
            else sorted(
                p for p in place.rglob("*") if p.suffix in (".py", ".yaml", ".jinja", ".css")
            )
        ):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
