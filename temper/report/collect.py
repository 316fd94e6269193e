"""Read a study's stage folders: the tidy results, the run cards and example answers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from temper.errors import TemperError
from temper.run_folder import CARD, EVALUATION, GENERATIONS, write_text
from temper.study.settings import Study, percent_of

COLUMNS = (
    "study",
    "objective",
    "attack",
    "harmful_ratio",
    "attack_lr",
    "attack_steps",
    "seed",
    "stage",
    "metric",
    "value",
    "ci_low",
    "ci_high",
    "n",
)
BASE = "base"  # the objective of the base model's rows
COUNTED_COSTS = ("steps", "passes", "forwards", "tokens", "flops")  # of a run card
EXAMPLE_KINDS = ("unsafe", "safe")
EXAMPLE_LENGTH = 400  # characters of an answer; longer ones are shortened

# -- stages


@dataclass(frozen=True)
class Stage:
    """One stage of a study and the folders that it was made in.

    Attributes:
        objective: Key of the objective, or ``base``.
        stage: ``base``, ``aligned`` or ``attacked``.
        seed: Seed.
        folders: The last one has the evaluation; the cost is that of all.
        trained: Whether the last folder was trained too, and has a run card; otherwise it was
            edited or only evaluated.
        attack: Key of the attack, if there is one.
        ratio: Its harmful ratio.
    """

    objective: str
    stage: str
    seed: int
    folders: tuple[Path, ...]
    trained: bool
    attack: str | None = None
    ratio: float | None = None

    @property
    def trained_folders(self) -> tuple[Path, ...]:
        """Folders with a run card."""
        return self.folders if self.trained else self.folders[:-1]


def stages(runs: Path, settings: Study) -> Iterator[Stage]:
    """Every stage of a study, in the order of its tables.

    Args:
        runs: The study's folder, ``runs/<study>``.
        settings: The study.
    """
    for seed in settings.seeds:
        root = runs / f"seed{seed}"
        if settings.base_given:
            yield Stage(BASE, "base", seed, (runs / "base",), trained=False)
        else:
            yield Stage(BASE, "base", seed, (root / "pretrain", root / "instruct"), trained=True)
        for objective, route in settings.routes.items():
            folders = tuple(root / folder for folder in route.aligned)
            yield Stage(objective, "aligned", seed, folders, trained=not route.edited)
        for objective, route in settings.routes.items():
            trained = route.retrained or not route.repaired
            for attack in settings.attacks:
                for ratio in settings.ratios:
                    folders = tuple(root / folder for folder in route.attacked(attack, ratio))
                    yield Stage(objective, "attacked", seed, folders, trained, attack, ratio)


# -- results and costs


@dataclass(frozen=True)
class Collected:
    """Everything that a study's folders hold.

    Attributes:
        results: Tidy metrics that a seed reproduces: proportions in [0, 1] and counted costs.
        costs: Measured costs (seconds, memory), same columns; they differ from run to run.
        cards: Every stage with its run cards, one pair per card.
        judges: Names of the judges that labelled the answers.
    """

    results: pd.DataFrame
    costs: pd.DataFrame
    cards: list[tuple[Stage, dict[str, Any]]]
    judges: tuple[str, ...]


def collect(runs: Path, settings: Study) -> Collected:
    """Read every stage.

    Raises:
        TemperError: A stage's file is missing or is not JSON.
    """
    results: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    cards: list[tuple[Stage, dict[str, Any]]] = []
    judges: dict[str, None] = {}
    for stage in stages(runs, settings):
        evaluation = _read(stage.folders[-1] / EVALUATION)
        judges[str(evaluation["judge"])] = None
        own_cards = [_read(folder / CARD) for folder in stage.trained_folders]
        cards.extend((stage, card) for card in own_cards)
        key = _key(stage, settings)
        results.extend(
            key | {"metric": name, **values} for name, values in evaluation["metrics"].items()
        )
        if not own_cards:  # an existing base model costs nothing
            continue
        own_costs = [card["cost"] for card in own_cards]
        peak = max(cost["peak_memory_mib"] for cost in own_costs)
        results.extend(
            key | {"metric": f"cost/{name}", "value": _sum(own_costs, name)}
            for name in COUNTED_COSTS
        )
        costs.append(key | {"metric": "cost/seconds", "value": _sum(own_costs, "seconds")})
        costs.append(key | {"metric": "cost/peak_memory_mib", "value": peak})
    return Collected(_frame(results), _frame(costs), cards, tuple(judges))


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a tidy table, whole or not at all; equal values give equal bytes."""
    write_text(path, frame.map(_csv_cell).to_csv(index=False, lineterminator="\n"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TemperError(
            f"{path}: missing, so this stage has not finished; run the study again (finished stages"
            " are kept) or remove the stage from study.yaml"
        ) from None
    except json.JSONDecodeError as error:
        raise TemperError(
            f"{path}: not JSON ({error}); delete the stage's folder and run the study again"
        ) from None
    return content


def _key(stage: Stage, settings: Study) -> dict[str, Any]:
    key = {
        "study": settings.name,
        "objective": stage.objective,
        "seed": stage.seed,
        "stage": stage.stage,
    }
    if stage.attack is None:
        return key
    return key | {
        "attack": stage.attack,
        "harmful_ratio": stage.ratio,
        "attack_lr": settings.learning_rates[stage.attack],
        "attack_steps": settings.steps[stage.attack],
    }


def _sum(costs: list[dict[str, Any]], name: str) -> float:
    return float(sum(cost[name] for cost in costs))


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    floats = ("harmful_ratio", "attack_lr", "value", "ci_low", "ci_high")
    types = dict.fromkeys(floats, "float64") | dict.fromkeys(("attack_steps", "n"), "Int64")
    return frame.astype(types)


def _csv_cell(value: Any) -> str:
    """Whole numbers in full (tokens, FLOPs), others with six digits, missing values empty."""
    if pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


# -- run cards


@dataclass(frozen=True)
class DataFile:
    """A data set by its hash, and the stages that read it."""

    name: str
    sha256: str
    used_by: str


@dataclass(frozen=True)
class StudyCard:
    """The run cards of a study, merged.

    Attributes:
        facts: Heading and value; where runs differ, the value lists all that occur.
        data: Every data hash.
    """

    facts: list[tuple[str, str]]
    data: list[DataFile]


def study_card(cards: list[tuple[Stage, dict[str, Any]]], settings: Study) -> StudyCard:
    """Merge the run cards of a study."""
    own = [card for _, card in cards]
    packages = dict.fromkeys(name for card in own for name in card.get("versions", {}))
    machine = dict.fromkeys(name for card in own for name in card.get("machine", {}))
    facts = [
        ("Code", _list(card.get("code") for card in own)),
        ("Seeds", ", ".join(str(seed) for seed in settings.seeds)),
        ("Parameters", _list(f"{card['parameters']:,}" for card in own if "parameters" in card)),
        ("Devices per run", _list(card.get("devices") for card in own)),
        ("Precision", _list(card.get("precision") for card in own)),
    ]
    facts += [
        (f"Machine, {name}", _list(card.get("machine", {}).get(name) for card in own))
        for name in machine
    ]
    facts += [
        (f"Version, {name}", _list(card.get("versions", {}).get(name) for card in own))
        for name in packages
    ]
    users: dict[tuple[str, str], dict[str, None]] = {}
    for stage, card in cards:
        for name, sha256 in card.get("data_sha256", {}).items():
            users.setdefault((name, sha256), {})[_stage_title(stage)] = None
    data = [DataFile(name, sha256, ", ".join(titles)) for (name, sha256), titles in users.items()]
    return StudyCard(facts, data)


def _stage_title(stage: Stage) -> str:
    return stage.stage if stage.ratio is None else f"attack, p = {percent_of(stage.ratio)}"


def _list(values: Iterable[Any]) -> str:
    """All different values, in the order of their first appearance."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "–"


# -- example answers


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt, with the judge's verdict."""

    model: str
    response: str
    verdict: str


def examples(runs: Path, settings: Study) -> list[tuple[str, list[Answer]]]:
    """The first prompts of each kind with every model's answer, of the first seed and the largest
    harmful ratio.

    Returns:
        Prompts with their answers in the order of the tables. Empty unless the study has
        ``show_answers``, the number of prompts of each kind.
    """
    found: dict[str, list[Answer]] = {}
    for model, stage in _example_stages(runs, settings):
        path = stage.folders[-1] / GENERATIONS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        for kind in EXAMPLE_KINDS:
            of_kind = [row for row in rows if row["kind"] == kind]
            for row in of_kind[: settings.show_answers]:
                verdict = "refused" if row["refused"] else row["label"]
                answer = Answer(model, _shortened(row["response"]), verdict)
                found.setdefault(row["prompt"], []).append(answer)
    return list(found.items())


def _example_stages(runs: Path, settings: Study) -> Iterator[tuple[str, Stage]]:
    """Stages whose answers are shown, each with the name of its model."""
    if not settings.show_answers:
        return
    for stage in stages(runs, settings):
        if stage.seed != settings.seeds[0] or stage.ratio not in (None, settings.ratios[-1]):
            continue
        model = settings.objectives.get(stage.objective, "base model")
        if stage.attack:
            attack = settings.attacks[stage.attack]
            model += f", {attack}, p = {percent_of(settings.ratios[-1])}"
        yield model, stage


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + " ..."
