"""``python -m temper.study.judge STUDY.yaml RUNS_FOLDER SEED``: judge a seed's answers.

All stages are judged in one process, so that a judge that is a model is loaded once. A stage whose
answers, judge settings and judge code are those of the last time is left alone.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from temper.errors import TemperError
from temper.judges.model import shared_models
from temper.run_folder import ANSWERS, CARD, EVALUATION, GENERATIONS, JUDGED, write_json
from temper.study.settings import Study
from temper.study.stages import Stage, evaluated, plain, stage_at

# One process on a CPU: judges that are models choose a device of their own.
TRAINER: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.logger": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
}


def judge(stage: Stage) -> bool:
    """Write ``evaluation.json`` and ``generations.jsonl`` of a stage from its answers.

    Returns:
        Whether it was judged; False where the judgements that are there are those.

    Raises:
        TemperError: it has not answered.
    """
    folder = Path(stage.folder)
    if not (folder / ANSWERS).is_file():
        raise TemperError(f"{folder / ANSWERS}: missing; run the study, which answers first")
    made_of = {
        "answers": hashlib.sha256((folder / ANSWERS).read_bytes()).hexdigest(),
        "judges": stage.judge_code,
    }
    files = [folder / name for name in (JUDGED, EVALUATION, GENERATIONS)]
    if all(file.is_file() for file in files) and json.loads(files[0].read_text()) == made_of:
        return False
    for file in files:
        file.unlink(missing_ok=True)
    _validate(stage)
    if stage.trained:
        _say_step(folder)
    write_json(folder / JUDGED, made_of)
    return True


def _validate(stage: Stage) -> None:
    """``train.py validate`` on the stored answers, in this process."""
    folder = Path(stage.folder)
    settings = stage.judge_settings
    with tempfile.TemporaryDirectory() as place:
        configs = []
        for number, content in enumerate(settings["configs"]):
            config = Path(place) / f"{number}.yaml"
            config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            configs.append(f"--config={config}")
        flags = settings["set"] | TRAINER | {"trainer.default_root_dir": folder}
        words = [f"--{key}={plain(value)}" for key, value in flags.items()]
        model = [
            "--model=StoredAnswers",
            f"--model.init_args.path={folder / ANSWERS}",
            # The model that answered may be deleted; all models of a study have one tokenizer.
            f"--model.init_args.tokenizer={stage.base}",
        ]
        # By name: the command line knows objectives, data and callbacks, and this package none.
        importlib.import_module("temper.cli.main").main(["validate", *configs, *words, *model])


def _say_step(folder: Path) -> None:
    """The step that the judged weights have; a validation has taken none."""
    evaluation = json.loads((folder / EVALUATION).read_text())
    evaluation["step"] = json.loads((folder / CARD).read_text())["cost"]["steps"]
    write_json(folder / EVALUATION, evaluation)


def main(argv: list[str] | None = None) -> int:
    """Judge a seed, or one stage of it; 2 for a user's error."""
    parser = argparse.ArgumentParser(prog="python -m temper.study.judge", description=__doc__)
    parser.add_argument("study", help="a YAML file such as studies/demo.yaml")
    parser.add_argument("runs", help="the study's folder, runs/<study>")
    parser.add_argument("seed", type=int, nargs="?", help="all stages of a seed are judged")
    parser.add_argument("--stage", help="one stage instead: seed0/align/sft")
    options = parser.parse_args(argv)
    if argv is None:
        del sys.argv[1:]  # they are not for the command line that runs below
    if (options.seed is None) is (options.stage is None):
        parser.error("give a seed, or --stage")
    try:
        study = Study.load(options.study)
        if options.stage:
            judge(stage_at(study, options.runs, options.stage))
            return 0
        stages = evaluated(study, options.runs, options.seed)
        with shared_models():
            judged = [judge(stage) for stage in stages]
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"judged {sum(judged)} of {len(judged)} stages; the others were judged before")
    folders = {"stages": [stage.folder for stage in stages]}
    write_json(Path(options.runs) / f"seed{options.seed}" / JUDGED, folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
