"""Read and check a study's YAML."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from temper.data.rows import harmful_count
from temper.errors import TemperError, did_you_mean

# MERGED from temper.study.settings: Through which folders an objective goes: most align, and are
# attacked; some act earlier or later. |  | * A defence in the alignment stage has a ``config`` of
# its own. | * One that edits weights starts from another objective's aligned model (``aligned_by``)
# and has ``edit``. | * One in the user's fine-tuning stage starts from another's aligned model and
# has ``attack``. | * One after it starts from another's attacked model and has ``repair``.


@dataclass(frozen=True)
class Route:
    """Where the models of an objective come from, as folders inside ``seed<n>/``.

    Attributes:
        objective: Its key in the study.
        aligned_by: The objective whose alignment it uses; itself, unless the study says otherwise.
        edited: Whether an edit of that alignment is its own aligned model.
        attacked_as: The objective whose attacked models it uses.
        repaired: Whether its figures are those after a repair.
        retrained: Whether that repair trains, and leaves a run card.
    """

    objective: str
    aligned_by: str
    edited: bool
    attacked_as: str
    repaired: bool
    retrained: bool

    @property
    def aligned(self) -> list[str]:
        """Folders that its aligned model was made in; the last one holds it."""
        return [f"align/{self.aligned_by}"] + ([f"align/{self.objective}"] if self.edited else [])

    def attacked(self, attack: str, ratio: float | str) -> list[str]:
        """Folders from the attack on; the last one holds the figures."""
        place = f"{attack}/p{float(ratio):g}"
        return [f"attack/{self.attacked_as}/{place}"] + (
            [f"repair/{self.objective}/{place}"] if self.repaired else []
        )


def route(objectives: Mapping[str, Any], objective: str) -> Route:
    """The route of an objective of a study."""
    part = objectives[objective] or {}
    aligned_by = part.get("aligned_by", objective)
    repair = part.get("repair")
    retrained = repair is not None and repair.get("verb", "fit") == "fit"
    own_attack = aligned_by == objective or "attack" in part or "edit" in part
    return Route(
        objective,
        aligned_by,
        "edit" in part,
        objective if own_attack else aligned_by,
        repair is not None,
        retrained,
    )


# MERGED from temper.study.settings: What a study starts from: a base model that it makes, or one
# that there is.


BEGINNINGS = (("pretrain", "instruct"), ("base_model",))  # a study has the keys of one of them
MODEL_FOLDERS = (
    "models",
    "runs",
)  # of this project: no organisations on a hub, even before there is such a folder


def check_beginning(study: dict[str, Any], path: Any) -> None:
    """Check that a study makes its base model, or names one that can be there.

    Args:
        study: Settings with the parts of a study.
        path: Where they are from.

    Raises:
        TemperError: both or neither; the model is no folder and no hub name; or what makes the
            study's files is no command.
    """
    if sum(all(key in study for key in keys) for keys in BEGINNINGS) != 1 or (
        "base_model" in study and "pretrain" in study
    ):
        raise TemperError(
            f"{path}: give either pretrain and instruct, which make a base model, or base_model,"
            " which names one"
        )
    base = study.get("base_model")
    if base is None:
        return
    model = base.get("path")
    if not isinstance(model, str):
        raise TemperError(
            f"{path}: base_model.path is {model!r}; give a model's folder, such as"
            " models/smollm2-135m-instruct"
        )
    if not Path(model).is_dir() and not _is_hub_name(model):
        raise TemperError(
            f"{path}: base_model.path={model}: no such folder; give a model's folder or a hub name,"
            " org/name (`make smollm2` fetches models/smollm2-135m-instruct)"
        )
    prepare = base.get("prepare", ["-m"])
    if not isinstance(prepare, list) or not prepare:
        raise TemperError(
            f"{path}: base_model.prepare is {prepare!r}; give the words of a Python command, such"
            " as [-m, temper.proxy, ...]"
        )


def _is_hub_name(path: str) -> bool:
    """Whether it reads ``org/name``, and ``org`` is no folder of this project."""
    from temper.models.folder import HUB_NAME  # brings transformers, which takes seconds

    first = path.partition("/")[0]
    return (
        HUB_NAME.fullmatch(path) is not None
        and first not in MODEL_FOLDERS
        and not Path(first).is_dir()
    )


REQUIRED = ("name", "title", "seeds", "align", "objectives", "attack", "attacks", "harmful_ratios")
OPTIONAL = (
    "description",
    "headline",
    "trainer",
    "base",
    "threads",
    "repair",
    "pretrain",
    "instruct",
    "base_model",
    "show_answers",
)
STAGES = ("base_model", "pretrain", "instruct", "align", "attack", "repair")
STAGE_PART = ("config", "set", "description")
GIVEN_PART = (*STAGE_PART, "path", "prepare")  # of base_model
PARTS = {
    "objectives": (*STAGE_PART, "label", "aligned_by", "edit", "attack", "repair"),
    "attacks": (*STAGE_PART, "label", "lr", "steps"),
    "repair": (*STAGE_PART, "verb"),  # of an objective
}


def load_study(path: str | Path) -> dict[str, Any]:
    """The study's settings, with every mistake in them that can be seen without running.

    A study may name another as its ``base``; its own keys replace those of the base, one level
    deep.

    Raises:
        TemperError: no such file, not a mapping, an unknown or missing key, a config file or a
            model's folder that does not exist, a harmful ratio that the attack's rows cannot have
            exactly, a headline that names an unknown objective or attack, or answers to show that
            are no number.
    """
    study = _read(Path(path))
    _check_keys(study, path)
    for name in STAGES:
        if name in study:
            _check_part(study[name], name, path, GIVEN_PART if name == "base_model" else STAGE_PART)
    check_beginning(study, path)
    if "trainer" in study:
        _check_config(study["trainer"], "trainer", path)
    for group in ("objectives", "attacks"):
        for name, part in study[group].items():
            _check_part(part, f"{group}.{name}", path, PARTS[group])
    for name in study["objectives"]:
        _check_objective(study, name, path)
    for name, part in study["attacks"].items():
        if "lr" not in part or "steps" not in part:
            raise TemperError(f"{path}: attacks.{name} needs lr and steps")
    if not study["seeds"]:
        raise TemperError(f"{path}: seeds is empty; give at least one whole number")
    if not study["harmful_ratios"]:
        raise TemperError(
            f"{path}: harmful_ratios is empty; give at least one value of p, such as [0.1]"
        )
    for stage in study.get("threads") or {}:
        if stage not in STAGES:
            raise TemperError(
                f"{path}: threads names no stage {stage!r}; choose from {', '.join(STAGES)}"
            )
    for ratio in study["harmful_ratios"]:
        for part in study["attacks"].values():
            for objective in study["objectives"].values():
                settings = (
                    study["attack"].get("set", {})
                    | part.get("set", {})
                    | objective.get("attack", {}).get("set", {})
                )
                harmful_count(ratio, settings.get("data.init_args.n_rows", 400))
    _check_headline(study, path)
    check_show_answers(study, path)
    return study


def check_show_answers(study: Mapping[str, Any], path: Any) -> None:
    """Refuse what is no number of answers: a negative one would publish nearly all.

    Args:
        study: Settings, whole or not.
        path: Where they are from.

    Raises:
        TemperError: ``show_answers`` is no whole number, or below 0.
    """
    shown = study.get("show_answers", 0)
    if not isinstance(shown, int) or isinstance(shown, bool) or shown < 0:
        raise TemperError(
            f"{path}: show_answers is {shown!r}; give how many prompts of each kind to show, a"
            " whole number >= 0 (0: none)"
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TemperError(f"study {path}: no such file; the project's own are studies/*.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TemperError(f"study {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise TemperError(
            f"study {path}: expected a mapping of settings, found {type(content).__name__}"
        )
    if "base" in content:
        base = _read(path.parent / content.pop("base"))
        return _merge(base, content)
    return content


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Own keys over the base's; for stage parts (``pretrain`` ... ``attack``) also their
    ``set``.
    """
    merged = base | own
    for name in STAGES:
        if name in base and name in own:
            merged[name] = base[name] | own[name]
            merged[name]["set"] = base[name].get("set", {}) | own[name].get("set", {})
    return merged


def _check_keys(study: dict[str, Any], path: Any) -> None:
    for key in study:
        if key not in REQUIRED + OPTIONAL:
            hint = did_you_mean(key, REQUIRED + OPTIONAL, "studies/demo.yaml has all of them")
            raise TemperError(f"{path}: unknown key {key!r}; {hint}")
    for key in REQUIRED:
        if key not in study:
            raise TemperError(
                f"{path}: the key {key!r} is missing; studies/demo.yaml has all of them"
            )


def _check_part(
    part: dict[str, Any], name: str, path: Any, keys: tuple[str, ...] = STAGE_PART
) -> None:
    if not isinstance(part, dict):
        raise TemperError(
            f"{path}: {name} is {part!r}; expected a mapping with keys of {', '.join(keys)}"
        )
    for key in part:
        if key not in keys:
            hint = did_you_mean(key, keys, f"accepted: {', '.join(keys)}")
            raise TemperError(f"{path}: unknown key {name}.{key}; {hint}")
    for config in part.get("config", []):
        _check_config(config, f"{name}.config", path)


def _check_config(config: Any, name: str, path: Any) -> None:
    if not isinstance(config, str) or not Path(config).is_file():
        raise TemperError(
            f"{path}: {name} names {config}, which does not exist (paths are relative to the"
            " project's root)"
        )


def _check_objective(study: dict[str, Any], name: str, path: Any) -> None:
    """Where an objective's models come from must be clear."""
    part, where = study["objectives"][name], f"{path}: objectives.{name}"
    own = [key for key in ("edit", "attack", "repair") if key in part]
    for key in ("attack", "repair"):
        if key in part:
            _check_part(
                part[key],
                f"objectives.{name}.{key}",
                path,
                PARTS["repair"] if key == "repair" else STAGE_PART,
            )
    verb = part.get("repair", {}).get("verb", "fit")
    if verb not in ("fit", "validate"):
        raise TemperError(f"{where}.repair.verb is {verb!r}; choose fit or validate")
    steps = "trainer.max_steps"
    if (
        "repair" in part
        and verb == "fit"
        and steps not in study.get("repair", {}).get("set", {}) | part["repair"].get("set", {})
    ):
        raise TemperError(
            f"{where}.repair needs {steps} in its set (or in that of the study's repair):"
            " evaluation follows the last step"
        )
    source = part.get("aligned_by")
    if source is None:
        if "edit" in part:
            raise TemperError(
                f"{where}: edit needs aligned_by, the objective whose aligned model is edited"
            )
        return
    others = study["objectives"]
    if source == name or source not in others or "aligned_by" in others[source]:
        raise TemperError(
            f"{where}.aligned_by is {source!r}; name another objective that has an alignment of"
            " its own"
        )
    if not own or part.keys() & {"config", "set"}:
        raise TemperError(
            f"{where}: with aligned_by, say what differs in edit, attack or repair (config and set"
            " are for an own alignment)"
        )
    edit = part.get("edit", ["interpolate"])
    if not isinstance(edit, list) or edit[:1] != ["interpolate"]:
        raise TemperError(
            f"{where}.edit is {edit!r}; give the words of a `python -m temper.edit interpolate`"
            " command, such as [interpolate, --a, 1.5]"
        )


def _check_headline(study: dict[str, Any], path: Any) -> None:
    headline = study.get("headline")
    if headline is None:
        return
    for key, group in (("attack", "attacks"), ("baseline", "objectives"), ("method", "objectives")):
        if headline.get(key) not in study[group]:
            raise TemperError(
                f"{path}: headline.{key}={headline.get(key)!r}: choose one of"
                f" {', '.join(study[group])}"
            )
