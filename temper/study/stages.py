"""Stages of a study: their commands and files, and the code that makes them run again.

pretrain -> instruct -> align/<objective> -> attack/<objective>/<attack>/p<ratio> (-> repair/...)

A study on an existing model (``base_model``) has, in place of the first two, the model's folder,
the study's own files in ``data/`` if it makes some, and the base model's evaluation in ``base/``,
the same for all seeds. A stage that is evaluated answers the evaluation prompts in a job of its
own, and is judged in another.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from temper.run_folder import ANSWERS, EVALUATION, JUDGED
from temper.study.closure import Code
from temper.study.contents import (
    JUDGING,
    answering,
    callbacks,
    judging,
    read_config,
    strings,
    training,
)
from temper.study.routes import Route
from temper.study.settings import ExistingModel, Kind, Objective, Part, Study

ANSWERS_CONFIG = "configs/study/answers.yaml"
# Settings of the model that answering has too.
ANSWERING = (
    "model.init_args.network.",
    "model.network.",
    "model.init_args.max_new_tokens",
    "model.max_new_tokens",
)
DATA_JUDGE = ("data.init_args.judge", "data.judge")  # settings that judging alone has
JUDGE = "temper.study.judge"
BASE = "base"  # folder of an existing base model's answers
PLACES = ("base", "aligned", "data")  # what {base}, ... in settings stand for

# Code that no result of a verb depends on.
NOWHERE = (
    "temper.preview",
    "temper.plan",
    "temper.report",
    "temper.study",
    "callbacks.start_checks",
)
# Nothing is judged while a stage trains, and answers only check its export.
NOT_IN_FIT = (
    *NOWHERE,
    "temper.judges",
    "temper.metrics",
    "temper.models.generate",
    "callbacks.answers",
    "callbacks.safety_evaluation",
)
# Nothing is trained or judged while a model answers.
NOT_IN_PREDICT = (
    *NOWHERE,
    "temper.judges",
    "temper.metrics",
    "callbacks.hf_export",
    "callbacks.preemption",
    "callbacks.probe_loss",
    "callbacks.run_card",
    "callbacks.safety_evaluation",
    "callbacks.throughput",
)
READS_IDS = ("temper.judges.base",)  # ids become text there

# Callbacks that measure no network at validation; any other is run by `validate` after answering.
NOT_MEASURING = (
    JUDGING,
    "SafetySteering",
    "HFExport",
    "Preemption",
    "ProbeLoss",
    "RunCard",
    "SaveAnswers",
    "StartChecks",
    "Throughput",
)
ALWAYS = ("train",)  # the command line
CODE = cache(Code)


@dataclass(frozen=True)
class Stage:
    """One stage of a study.

    Args:
        study: The study.
        runs: The study's folder, ``runs/<study>``.
        seed: Seed of weights, rows and order.
        place: Its folder inside ``seed<n>/``, such as ``align/booster``; or ``base``.
    """

    study: Study
    runs: str
    seed: int
    place: str

    # -- what it is

    @property
    def folder(self) -> str:
        """Run folder."""
        return f"{self.runs}/{BASE}" if self.place == BASE else self._at(self.place)

    @property
    def words(self) -> list[str]:
        """Kind, and keys of objective and attack and the ratio, as far as it has them."""
        return self.place.split("/")

    @property
    def kind(self) -> Kind:
        """Which part of the study's YAML it has."""
        return "base_model" if self.place == BASE else self.words[0]  # type: ignore[return-value]

    @property
    def objective(self) -> Objective:
        """Its objective; an empty one for the base model."""
        return self.study.objective_parts[self.words[1]] if len(self.words) > 1 else Objective()

    @property
    def route(self) -> Route:
        """The route of its objective."""
        return self.study.routes[self.words[1]]

    @property
    def ratio(self) -> str:
        """Harmful ratio, as it stands in the folder's name."""
        return self.words[3].removeprefix("p")

    @property
    def edited(self) -> bool:
        """Whether weights are edited, in place of a training."""
        return self.kind == "align" and self.route.edited

    @property
    def trained(self) -> bool:
        """Whether it has a `fit`."""
        if self.kind == "repair":
            return self.route.retrained
        return self.kind != "base_model" and not self.edited

    @property
    def threads(self) -> int:
        """OpenMP threads; results depend on them bit for bit."""
        return 1 if self.edited else (self.study.threads or {}).get(self.kind, 1)

    # -- models

    @property
    def base(self) -> str:
        """The base model."""
        given = self.study.base_model
        return given.path if given else self._at("instruct/export")

    @property
    def start(self) -> str | None:
        """The model that it starts from; None for the first stage."""
        match self.kind:
            case "pretrain":
                return None
            case "instruct":
                return self._at("pretrain/export")
            case "attack":
                return self._at(f"{self.route.aligned[-1]}/export")
            case "repair":
                attacked = self.route.attacked(self.words[2], self.ratio)[0]
                return self._at(f"{attacked}/export")
            case _:
                return self._at(f"{self.route.aligned[0]}/export") if self.edited else self.base

    @property
    def model(self) -> str:
        """The model that answers."""
        if self.trained or self.edited:
            return f"{self.folder}/export"
        assert self.start is not None
        return self.start

    @property
    def inputs(self) -> list[str]:
        """Models that a fit or an edit reads, apart from an existing base model."""
        made = [] if self.start is None or self.start == self._existing else [self.start]
        if (self.edited or self._named("base")) and self.base != self._existing:
            made.append(self.base)
        if self.kind == "repair" and self._named("aligned"):
            made.append(self._at(f"{self.route.aligned[-1]}/export"))
        return list(dict.fromkeys(made))

    @property
    def answers_from(self) -> list[str]:
        """Models that answering reads, apart from an existing base model."""
        made = [] if self.model == self._existing else [self.model]
        return made if self.trained or self.edited else list(dict.fromkeys([*made, *self.inputs]))

    # -- commands

    @property
    def fit_command(self) -> str:
        """``train.py fit``, as one would type it. Nothing is evaluated: that is another stage."""
        settings = self._filled() | self._common()
        steps = settings.get("trainer.max_steps", 1)
        settings |= {"trainer.val_check_interval": steps, "trainer.limit_val_batches": 0}
        start = self.start
        network = "model.init_args.network."
        settings[f"{network}path" if start else f"{network}shape.seed"] = start or self.seed
        return _command("fit", self.configs, settings)

    @property
    def edit_command(self) -> str:
        """``temper.edit`` on the aligned model."""
        assert self.objective.edit is not None and self.start is not None
        verb, *flags = map(str, self.objective.edit)
        folders = ["--base", self.base, "--aligned", self.start, "--out", f"{self.folder}/export"]
        return shlex.join([sys.executable, "-m", "temper.edit", verb, *folders, *flags])

    @property
    def answer_command(self) -> str:
        """``train.py predict`` on the model, and ``validate`` where callbacks measure a network."""
        settings = {
            key: value
            for key, value in self._filled().items()
            if not key.startswith("model") or key.startswith(ANSWERING)
        }
        settings |= self._common() | {
            "model.init_args.network.path": self.model,
        }
        configs = [*self.configs, ANSWERS_CONFIG]
        verbs = ["predict", *(["validate"] if self.measuring else [])]
        return " && ".join(_command(verb, configs, settings) for verb in verbs)

    @property
    def judge_settings(self) -> dict[str, Any]:
        """Configs and settings of the judges and the evaluation prompts."""
        data = {key: value for key, value in self._settings.items() if key.split(".")[0] == "data"}
        parts = [judging(content) for content in self._contents]
        return {"configs": [part for part in parts if part], "set": self._fill(data)}

    # -- what makes it run again

    @property
    def fit_code(self) -> str:
        """Hash of the code and configs that a fit depends on."""
        contents = [training(content) for content in self._contents]
        names = [*ALWAYS, "Preemption", *strings([contents, self._settings])]
        return _hash(contents, names, NOT_IN_FIT)

    @property
    def answer_code(self) -> str:
        """Hash of the code and configs that answers depend on."""
        contents = [*map(answering, self._contents), read_config(ANSWERS_CONFIG)]
        settings = {k: v for k, v in self._settings.items() if k.startswith(("data", "trainer"))}
        names = [*ALWAYS, "SaveAnswers", "SFTModule", *strings([contents, settings])]
        if self.measuring:
            return _hash(self._contents, [*names, *strings(self._contents)], NOWHERE)
        return _hash(contents, names, NOT_IN_PREDICT, READS_IDS)

    @property
    def judge_code(self) -> str:
        """Hash of judges, metrics and evaluation prompts: their code and their settings."""
        settings = self.judge_settings
        names = ["StoredAnswers", JUDGING, *strings(settings)]
        return _hash([settings], names, NOWHERE)

    # -- parts

    @property
    def configs(self) -> list[str]:
        """Config files of a fit, later ones winning: the trainer, the stage, attack, objective."""
        return [self.study.trainer, *(config for part in self._parts for config in part.config)]

    @property
    def measuring(self) -> bool:
        """Whether a callback measures the network at validation, which a fit here has none of."""
        names = {
            str(one.get("class_path", "")) if isinstance(one, dict) else str(one)
            for content in self._contents
            for one in callbacks(content)
        }
        own = {name for name in names if not name.startswith(("lightning.", "pytorch_lightning."))}
        return any(name.rpartition(".")[2] not in NOT_MEASURING for name in own)

    @property
    def _parts(self) -> list[Part]:
        """Parts of the YAML; later ones win: what the stage has, the attack, the objective."""
        kind: Part | None = getattr(self.study, self.kind)
        parts: list[Part] = [kind or Part()]
        if self.kind == "align" and not self.edited:
            parts.append(self.objective)
        elif self.kind == "attack":
            parts.append(self.study.attack_parts[self.words[2]])
            parts.append(self.objective.attack or Part())
        elif self.kind == "repair":
            parts.append(self.objective.repair or Part())
        return parts

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings of the YAML, and those that every attack has."""
        settings = dict(self._parts[0].settings)
        if self.kind == "attack":
            attack = self.study.attack_parts[self.words[2]]
            settings |= {
                "model.init_args.optimizer.init_args.lr": attack.lr,
                "trainer.max_steps": attack.steps,
                "data.init_args.harmful_ratio": self.ratio,
            }
        for part in self._parts[1:]:
            settings |= part.settings
        return settings | {"data.init_args.seed": self.seed}

    def _filled(self) -> dict[str, Any]:
        """Settings of a command: no judge is built from them."""
        return self._fill(
            {key: one for key, one in self._settings.items() if not key.startswith(DATA_JUDGE)}
        )

    def _fill(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with the folders that ``{base}``, ``{aligned}`` and ``{data}`` stand for."""
        folders = {"base": self.base, "data": f"{self.runs}/data"}
        if self.kind == "repair":
            folders["aligned"] = self._at(f"{self.route.aligned[-1]}/export")

        def fill(value: Any) -> Any:
            if isinstance(value, str):
                for name in PLACES:
                    value = value.replace("{" + name + "}", folders.get(name, ""))
            return value

        return {key: fill(value) for key, value in settings.items()}

    def _common(self) -> dict[str, Any]:
        return {"seed_everything": self.seed, "trainer.default_root_dir": self.folder}

    @property
    def _existing(self) -> str | None:
        return self.study.base_model.path if self.study.base_model else None

    @cached_property
    def _contents(self) -> list[dict[str, Any]]:
        return [read_config(config) for config in self.configs]

    def _named(self, place: str) -> bool:
        """Whether a setting names a folder of another stage."""
        return any("{" + place + "}" in str(value) for value in self._settings.values())

    def _at(self, place: str) -> str:
        return f"{self.runs}/seed{self.seed}/{place}"


# -- the study's other jobs


def evaluated(study: Study, runs: str, seed: int) -> list[Stage]:
    """The stages that the report reads of a seed; an existing base model is one of the first's."""
    routes = study.routes.values()
    places = [] if study.base_given else ["instruct"]
    if study.base_given and seed == study.seeds[0]:
        places = [BASE]
    places += [route.aligned[-1] for route in routes]
    places += [
        route.attacked(attack, ratio)[-1]
        for route in routes
        for attack in study.attacks
        for ratio in study.harmful_ratios
    ]
    return [Stage(study, runs, seed, place) for place in dict.fromkeys(places)]


def stage_at(study: Study, runs: str, folder: str) -> Stage:
    """The stage of a run folder below ``runs``, such as ``seed0/align/sft``, or ``base``."""
    if folder == BASE:
        return Stage(study, runs, study.seeds[0], BASE)
    seed, _, place = folder.partition("/")
    return Stage(study, runs, int(seed.removeprefix("seed")), place)


def report_inputs(study: Study, runs: str) -> list[str]:
    """Files that say that every seed is judged."""
    return [f"{runs}/seed{seed}/{JUDGED}" for seed in study.seeds]


def evaluations(study: Study, runs: str) -> list[str]:
    """``evaluation.json`` of every stage that the report reads."""
    return [
        f"{stage.folder}/{EVALUATION}"
        for seed in study.seeds
        for stage in evaluated(study, runs, seed)
    ]


def answers(study: Study, runs: str, seed: int) -> list[str]:
    """``answers.jsonl`` of every stage that a seed is judged on."""
    return [f"{stage.folder}/{ANSWERS}" for stage in evaluated(study, runs, seed)]


def judge_command(study_file: str, runs: str, *words: str) -> str:
    """The command that judges the stages of a seed, or one."""
    return shlex.join([sys.executable, "-m", JUDGE, study_file, runs, *words])


def judge_code(stages: Iterable[Stage]) -> str:
    """Hash of what the judgements of several stages depend on."""
    own = CODE(Path()).digest([JUDGE], ("temper", "train"), (JUDGE,))
    return _text_hash([own, *(stage.judge_code for stage in stages)])


def prepare_command(model: ExistingModel, folder: str) -> str:
    """The command that makes a study's own files; ``{model}`` and ``{data}`` in it are the base
    model and the files' folder.
    """
    assert model.prepare is not None
    words = [
        str(word).replace("{model}", model.path).replace("{data}", folder) for word in model.prepare
    ]
    return shlex.join([sys.executable, *words])


def prepare_code(model: ExistingModel) -> str:
    """Hash of the code behind that command."""
    words = [str(word) for word in model.prepare or []]
    scripts = [Path(word).read_text() for word in words if word.endswith(".py")]
    mains = [f"{word}.__main__" for word in words]
    return _hash([{"scripts": scripts}], [*words, *mains], NOWHERE)


def edit_code() -> str:
    """Hash of the code that edits weights."""
    return CODE(Path()).digest(["temper.edit.__main__"], NOWHERE)


def report_hash() -> str:
    """Hash of the code that makes tables and reports of finished stages: a change makes them
    anew.
    """
    return CODE(Path()).digest(["temper.report.html"])


# -- hashes


def _hash(
    contents: Iterable[Any], names: Iterable[str], without: Iterable[str], but: Iterable[str] = ()
) -> str:
    code = _digest(_key(names), _key(without), _key(but))
    return _text_hash([json.dumps(list(contents), default=str), code])


def _key(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


@cache
def _digest(names: tuple[str, ...], without: tuple[str, ...], but: tuple[str, ...]) -> str:
    return CODE(Path()).digest(names, without, but)


def _text_hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


# -- words


def _command(verb: str, configs: Iterable[str], settings: Mapping[str, Any]) -> str:
    words = [sys.executable, "train.py", verb]
    words += [word for config in configs for word in ("--config", config)]
    words += [f"--{key}={plain(value)}" for key, value in settings.items()]
    return shlex.join(words)


def plain(value: Any) -> str:
    """A value as the command line reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
