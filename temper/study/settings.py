"""The settings of a study: one class, read by the workflow and by the report alike."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from temper.data.rows import harmful_count
from temper.errors import TemperError, did_you_mean
from temper.study.routes import Route

STUDY_FILE = "study.yaml"  # a study's settings, in its folder below runs/
Kind = Literal["base_model", "pretrain", "instruct", "align", "attack", "repair"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODEL_FOLDERS = ("models", "runs")  # of this project: never organisations on a hub
N_ROWS = 400  # of an attack, unless its settings say otherwise
NEEDED = ("name", "title", "seeds", "align", "objectives", "attack", "attacks", "harmful_ratios")
MAX_STEPS = "trainer.max_steps"


# -- sections of a study


class Part(BaseModel):
    """A section of a study: configs and settings that a stage adds to its command.

    Attributes:
        config: YAML files, relative to the project's root; later ones win.
        settings: ``set`` in the YAML: flag and value; they win over all files.
        description: For the reader.
    """

    model_config = ConfigDict(extra="forbid")

    config: list[str] = []
    settings: dict[str, Any] = Field(default_factory=dict, alias="set")
    description: str | None = None


class ExistingModel(Part):
    """A base model that the study does not make.

    Attributes:
        path: Folder in Hugging Face format, or a hub name.
        prepare: Words of a Python command that makes the study's own files.
    """

    path: str
    prepare: list[Any] | None = Field(default=None, min_length=1)


class Repair(Part):
    """A defence after the attack.

    Attributes:
        verb: ``fit`` trains the attacked model further; ``validate`` only evaluates it, with
            something switched on.
    """

    verb: Literal["fit", "validate"] = "fit"


def _label(value: Any) -> Any:
    return value if value is None else str(value)


Label = Annotated[str | None, BeforeValidator(_label)]


class Objective(Part):
    """One way of making a model safe; see `Route` for ``aligned_by``, ``edit``, ``attack`` and
    ``repair``.
    """

    label: Label = None
    aligned_by: str | None = None
    edit: list[Any] | None = None
    attack: Part | None = None
    repair: Repair | None = None

    def route(self, key: str) -> Route:
        """The route of the objective that has this key in its study."""
        aligned_by = self.aligned_by or key
        edited = self.edit is not None
        own_attack = aligned_by == key or self.attack is not None or edited
        return Route(
            key,
            aligned_by,
            edited,
            key if own_attack else aligned_by,
            self.repair is not None,
            self.repair is not None and self.repair.verb == "fit",
        )

    @model_validator(mode="after")
    def _check_edit(self) -> Self:
        if self.edit is None:
            return self
        if self.edit[:1] != ["interpolate"]:
            raise TemperError(
                f"edit: found {self.edit!r}; accepted: the words of a `python -m temper.edit"
                " interpolate` command, such as [interpolate, --a, 1.5]"
            )
        if self.aligned_by is None:
            raise TemperError(
                "edit: found without aligned_by; give in aligned_by the objective whose aligned"
                " model is edited"
            )
        return self


class Attack(Part):
    """One fine-tuning attack."""

    label: Label = None
    lr: float | None = None
    steps: int | None = None


class Contest(BaseModel):
    """The comparison a study was made for: keys of one attack and two objectives."""

    model_config = ConfigDict(extra="forbid")

    attack: str
    baseline: str
    method: str


# -- the study


class Study(BaseModel):
    """A study: objectives, the attacks that each meets, at every harmful ratio and seed.

    Attributes:
        objective_parts: ``objectives`` in the YAML.
        attack_parts: ``attacks`` in the YAML.
        show_answers: Prompts of each kind whose answers the report shows, per model.
        keep_attacked: Keep the weights of attacked models; otherwise they are deleted once all
            that starts from them is done.
        threads: OpenMP threads of a kind of stage, where not 1: results depend on them bit for bit.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str = ""
    description: str | None = None
    seed_list: list[Annotated[NonNegativeInt, Field(strict=True)]] = Field(
        alias="seeds", min_length=1
    )
    trainer: str = "configs/trainer/cpu.yaml"
    threads: dict[Kind, PositiveInt] | None = None
    show_answers: NonNegativeInt = Field(default=0, strict=True)
    keep_attacked: bool = Field(default=False, strict=True)
    base_model: ExistingModel | None = None
    pretrain: Part | None = None
    instruct: Part | None = None
    align: Part = Part()
    attack: Part = Part()
    repair: Part = Part()
    objective_parts: dict[str, Objective] = Field(alias="objectives", min_length=1)
    attack_parts: dict[str, Attack] = Field(alias="attacks", min_length=1)
    harmful_ratios: list[float] = Field(min_length=1)
    contest: Contest | None = Field(default=None, alias="headline")
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    # -- reading

    @classmethod
    def of(cls, content: Mapping[str, Any], where: Any = STUDY_FILE) -> Self:
        """Read a study's mapping.

        Args:
            content: The YAML, with its base already merged in.
            where: The file, for messages.

        Raises:
            TemperError: an unknown or missing key, a value of another type, an objective whose
                models come from nowhere, or a headline that names what the study does not have.
        """
        try:
            study = cls.model_validate(content)
        except ValidationError as error:
            raise TemperError(f"{where}: {_first_of(cls, error)}") from None
        study._given = dict(content)
        return study

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a study's file to run it, with every error in it that can be seen without running.

        A study may name another as its ``base``; its own keys replace those of the base, one level
        deep.

        Raises:
            TemperError: as `of`; or no such file, not a mapping, a config file or a model's folder
                that does not exist, an attack without rate or steps, or a harmful ratio that the
                attack's rows cannot have exactly.
        """
        content = _read(Path(path))
        for key in NEEDED:
            if key not in content:
                known = set(content) - set(_keys(cls))
                wrong = f"; found {', '.join(map(repr, sorted(known)))}" if known else ""
                raise TemperError(
                    f"{path}: {key}: missing{wrong}; add it (studies/demo.yaml has all keys)"
                )
        study = cls.of(content, path)
        try:
            study._check_to_run()
        except TemperError as error:
            raise TemperError(f"{path}: {error}") from None
        return study

    @classmethod
    def of_runs(cls, folder: Path) -> Self:
        """Read the settings that a study left in its folder.

        Raises:
            TemperError: there are none, or they are no study.
        """
        path = folder / STUDY_FILE
        if not path.is_file():
            raise TemperError(
                f"{path}: missing; give a study's folder (runs/<study>), and run the study first"
            )
        return cls.of(_mapping(path), path)

    def as_yaml(self) -> dict[str, Any]:
        """The mapping that the study was read from, base merged in."""
        return self._given

    def as_text(self) -> str:
        """The same as the text of a YAML file."""
        return yaml.safe_dump(self._given, sort_keys=False)

    # -- what the report reads

    @property
    def objectives(self) -> dict[str, str]:
        """Key to label; the order is that of every table and of the colours."""
        return {key: part.label or key for key, part in self.objective_parts.items()}

    @property
    def attacks(self) -> dict[str, str]:
        """Key to label."""
        return {key: part.label or key for key, part in self.attack_parts.items()}

    @property
    def learning_rates(self) -> dict[str, float | None]:
        """Attack to learning rate, if it has one."""
        return {key: part.lr for key, part in self.attack_parts.items()}

    @property
    def steps(self) -> dict[str, int | None]:
        """Attack to optimizer steps, if it has any."""
        return {key: part.steps for key, part in self.attack_parts.items()}

    @property
    def ratios(self) -> tuple[float, ...]:
        """Harmful ratios p, rising."""
        return tuple(sorted(set(self.harmful_ratios)))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds."""
        return tuple(self.seed_list)

    @cached_property
    def routes(self) -> dict[str, Route]:
        """Objective to the folders its models are made in."""
        return {key: part.route(key) for key, part in self.objective_parts.items()}

    @property
    def base_given(self) -> bool:
        """Whether the base model is an existing one, which is evaluated once for all seeds."""
        return self.base_model is not None

    @property
    def counted_ratios(self) -> tuple[float, ...]:
        """The ratios that a mean harmful score is taken over: those above 0, or 0 if a study has no
        other.
        """
        return tuple(p for p in self.ratios if p > 0) or self.ratios

    @property
    def ratio_words(self) -> str:
        """The same in words, for headings."""
        if len(self.counted_ratios) == 1:
            return f"at p = {percent_of(self.counted_ratios[0])}"
        return f"mean over p = {', '.join(f'{100 * p:g}' for p in self.counted_ratios)} %"

    # -- checks

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        self.title = self.title or self.name
        for key, part in self.objective_parts.items():
            if part.aligned_by is not None:
                self._check_source(key, part)
        if self.contest is None:
            return self
        for role, known in (
            ("attack", self.attack_parts),
            ("baseline", self.objective_parts),
            ("method", self.objective_parts),
        ):
            if (found := getattr(self.contest, role)) not in known:
                raise TemperError(
                    f"headline.{role}: found {found!r}; accepted: {', '.join(known)}; change it,"
                    " or drop headline"
                )
        return self

    def _check_source(self, key: str, part: Objective) -> None:
        """Where the models of an objective that has no alignment of its own come from."""
        source = part.aligned_by
        others = self.objective_parts
        own = [key for key, one in others.items() if one.aligned_by is None]
        if source not in own or source == key:
            raise TemperError(
                f"objectives.{key}.aligned_by: found {source!r}; accepted: another objective that"
                f" has an alignment of its own ({', '.join(one for one in own if one != key)})"
            )
        if (part.edit, part.attack, part.repair) == (None, None, None) or (
            part.model_fields_set & {"config", "settings"}
        ):
            raise TemperError(
                f"objectives.{key}: with aligned_by, say what differs in edit, attack or repair"
                " (config and set are for an own alignment)"
            )

    def _check_to_run(self) -> None:
        """Check what matters before stages run: files, models, steps."""
        self._check_beginning()
        files = {"trainer": [self.trainer]}
        for kind in KINDS:
            if (part := getattr(self, kind)) is not None:
                files[f"{kind}.config"] = part.config
        for key, objective in self.objective_parts.items():
            files[f"objectives.{key}.config"] = objective.config
            for name in ("attack", "repair"):
                if (part := getattr(objective, name)) is not None:
                    files[f"objectives.{key}.{name}.config"] = part.config
            self._check_repair(key, objective)
        for key, attack in self.attack_parts.items():
            files[f"attacks.{key}.config"] = attack.config
            for name in ("lr", "steps"):
                if getattr(attack, name) is None:
                    raise TemperError(
                        f"attacks.{key}.{name}: missing; an attack needs lr and steps"
                    )
        for place, configs in files.items():
            for config in configs:
                if not Path(config).is_file():
                    raise TemperError(
                        f"{place}: found {config}, which does not exist; give YAML files, relative"
                        " to the project's root"
                    )
        self._check_ratios()

    def _check_beginning(self) -> None:
        """A base model is made, or named."""
        made = self.pretrain is not None and self.instruct is not None
        if made is self.base_given or (self.base_given and self.pretrain is not None):
            raise TemperError(
                "give either pretrain and instruct, which make a base model, or base_model, which"
                " names one"
            )
        if self.base_model is None:
            return
        path = self.base_model.path
        if not Path(path).is_dir() and not _is_hub_name(path):
            raise TemperError(
                f"base_model.path: found {path}, no such folder; give a model's folder or a hub"
                " name, org/name (`make smollm2` fetches models/smollm2-135m-instruct)"
            )

    def _check_repair(self, key: str, objective: Objective) -> None:
        repair = objective.repair
        if repair is None or repair.verb != "fit":
            return
        if MAX_STEPS not in self.repair.settings | repair.settings:
            way = f"{MAX_STEPS} is missing; give it there, or in the set of the study's repair"
            raise TemperError(f"objectives.{key}.repair.set: {way}")

    def _check_ratios(self) -> None:
        for ratio in self.harmful_ratios:
            for attack in self.attack_parts.values():
                for objective in self.objective_parts.values():
                    own = objective.attack.settings if objective.attack else {}
                    settings = self.attack.settings | attack.settings | own
                    harmful_count(ratio, settings.get("data.init_args.n_rows", N_ROWS))


def percent_of(ratio: float) -> str:
    """A ratio as people read it: ``5 %``."""
    return f"{100 * ratio:g} %"


# -- files


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TemperError(f"study {path}: no such file; the project's own are studies/*.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TemperError(f"study {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise TemperError(
            f"study {path}: found {type(content).__name__}; accepted: a mapping (name, objectives,"
            " attacks, ...)"
        )
    return content


def _read(path: Path) -> dict[str, Any]:
    """A study's mapping over that of its base."""
    content = _mapping(path)
    if "base" not in content:
        return content
    base = _read(path.parent / content.pop("base"))
    merged = base | content
    for kind in KINDS:
        below = base.get(kind)
        own = content.get(kind)
        if isinstance(below, dict) and isinstance(own, dict):
            merged[kind] = below | own
            merged[kind]["set"] = (below.get("set") or {}) | (own.get("set") or {})
    return merged


def _is_hub_name(path: str) -> bool:
    """Whether it reads ``org/name``, and ``org`` is no folder of this project."""
    from temper.models.folder import HUB_NAME  # brings transformers, which takes seconds

    first = path.partition("/")[0]
    return (
        HUB_NAME.fullmatch(path) is not None
        and first not in MODEL_FOLDERS
        and not Path(first).is_dir()
    )


# -- messages


def _first_of(model: type[BaseModel], error: ValidationError) -> str:
    """The first error that pydantic found, in one line: ``key.path: found X; accepted ...``."""
    errors = error.errors()
    # An unknown key says more than the key that is missing because of it.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(key) for key in first["loc"] if key != "[key]")
    reason = (first.get("ctx") or {}).get("error")
    if isinstance(reason, TemperError):
        return f"{place}.{reason}" if place else str(reason)
    if first["type"] == "missing":
        return f"{place}: missing or empty; add it (studies/demo.yaml has all keys)"
    if first["type"] == "extra_forbidden":
        known = _keys(_section(model, first["loc"][:-1]))
        otherwise = f"accepted: {', '.join(known)}"
        return f"{place}: unknown key; {did_you_mean(str(first['loc'][-1]), known, otherwise)}"
    accepted = first["msg"].removeprefix("Input should be ")
    if first["type"] == "too_short":
        accepted = "at least one"
    elif first["type"] == "model_type":
        accepted = f"a mapping with keys of {', '.join(_keys(_section(model, first['loc'])))}"
    return f"{place}: found {first['input']!r}; accepted: {accepted}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(model: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The class that reads the section at a place."""
    keys = iter(place)
    for key in keys:
        field = next(one for name, one in model.model_fields.items() if key == (one.alias or name))
        inner = [field.annotation, *get_args(field.annotation)]
        model = next(one for one in inner if isinstance(one, type) and issubclass(one, BaseModel))
        if get_origin(field.annotation) is dict:
            next(keys, None)  # the name that the user gave a section
    return model
