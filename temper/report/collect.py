"""Stage folders -> one tidy table."""

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
    *(
        "study",
        "objective",
        "attack",
        "harmful_ratio",
        "attack_lr",
        "attack_steps",
        "seed",
        "stage",
    ),
    *("metric", "value", "ci_low", "ci_high", "n"),
)
EXACT_COSTS = ("steps", "passes", "forwards", "tokens", "flops")
MEASURED_COSTS = ("seconds", "peak_memory_mib")
BASE = "base"


@dataclass(frozen=True)
class Stage:
    """One stage of a study and the folders it was made in: the last one is evaluated, all of them
    cost.
    """

    objective: str
    stage: str
    seed: int
    folders: tuple[Path, ...]
    trained: bool = (
        True  # in all of them; otherwise in all but the last, which was edited or evaluated only
    )
    attack: str | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Collected:
    """A study's folders, read.

    Attributes:
        results: Tidy figures that a seed reproduces: proportions in [0, 1] and counted costs.
        costs: Measured costs (seconds, memory), same columns; they differ from run to run.
        cards: Every stage with its run card.
        judges: Names of the judges that gave the figures.
    """

    results: pd.DataFrame
    costs: pd.DataFrame
    cards: list[tuple[Stage, dict[str, Any]]]
    judges: tuple[str, ...]


def stages(runs: Path, settings: Study) -> Iterator[Stage]:
    """Every stage a study has, in the order of its tables."""
    for seed in settings.seeds:
        root = runs / f"seed{seed}"
        made = (root / "pretrain", root / "instruct")
        yield Stage(
            BASE,
            "base",
            seed,
            (runs / "base",) if settings.base_given else made,
            not settings.base_given,
        )
        for objective, route in settings.routes.items():
            yield Stage(
                objective,
                "aligned",
                seed,
                tuple(root / place for place in route.aligned),
                not route.edited,
            )
        for objective, route in settings.routes.items():
            for attack in settings.attacks:
                for ratio in settings.ratios:
                    folders = tuple(root / place for place in route.attacked(attack, ratio))
                    yield Stage(
                        objective,
                        "attacked",
                        seed,
                        folders,
                        route.retrained or not route.repaired,
                        attack,
                        ratio,
                    )


def collect(runs: Path, settings: Study) -> Collected:
    """Read every stage.

    Raises:
        TemperError: A stage's file is missing or broken.
    """
    results: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    cards: list[tuple[Stage, dict[str, Any]]] = []
    judges: dict[str, None] = {}
    for stage in stages(runs, settings):
        evaluation = _read(stage.folders[-1] / EVALUATION)
        judges[str(evaluation["judge"])] = None
        own_cards = [
            _read(folder / CARD)
            for folder in (stage.folders if stage.trained else stage.folders[:-1])
        ]
        cards.extend((stage, card) for card in own_cards)
        key = _key(stage, settings)
        results.extend(
            key | {"metric": name, **figure} for name, figure in evaluation["metrics"].items()
        )
        if not own_cards:  # a base model that was there
            continue
        results.extend(
            key | {"metric": f"cost/{name}", "value": _sum(own_cards, name)} for name in EXACT_COSTS
        )
        costs.append(key | {"metric": "cost/seconds", "value": _sum(own_cards, "seconds")})
        costs.append(
            key
            | {
                "metric": "cost/peak_memory_mib",
                "value": max(card["cost"]["peak_memory_mib"] for card in own_cards),
            }
        )
    return Collected(_frame(results), _frame(costs), cards, tuple(judges))


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a tidy table: the same bytes for the same figures; a file is whole or absent."""
    text = frame.map(_cell).to_csv(index=False, lineterminator="\n")
    write_text(path, text)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TemperError(
            f"{path}: missing, so this stage has not finished; run the study again (finished stages"
            " are kept) or take the stage out of study.yaml"
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
    lr, steps = settings.learning_rates[stage.attack], settings.steps[stage.attack]
    return key | {
        "attack": stage.attack,
        "harmful_ratio": stage.ratio,
        "attack_lr": lr,
        "attack_steps": steps,
    }


def _sum(cards: list[dict[str, Any]], name: str) -> float:
    return float(sum(card["cost"][name] for card in cards))


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds = dict.fromkeys(("harmful_ratio", "attack_lr", "value", "ci_low", "ci_high"), "float64")
    return frame.astype(kinds | dict.fromkeys(("attack_steps", "n"), "Int64"))


def _cell(value: Any) -> str:
    """Whole numbers in full (tokens, FLOPs), others with six digits, nothing for what is not
    there.
    """
    if pd.isna(value):
        return ""
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


# MERGED from temper.report.collect: What all stages of a study were made with.


@dataclass(frozen=True)
class DataFile:
    """Data by its hash, and the stages that read it."""

    name: str
    sha256: str
    used_by: str


@dataclass(frozen=True)
class StudyCard:
    """The run cards of a study, put together.

    Attributes:
        facts: Heading and value; a value lists all that occur, so a mixed study shows.
        data: Every data hash.
    """

    facts: list[tuple[str, str]]
    data: list[DataFile]


def study_card(cards: list[tuple[Stage, dict[str, Any]]], settings: Study) -> StudyCard:
    """Put the run cards together."""
    own = [card for _, card in cards]
    packages = dict.fromkeys(name for card in own for name in card.get("versions", {}))
    machine = dict.fromkeys(name for card in own for name in card.get("machine", {}))
    facts = [
        ("Code", _all(card.get("code") for card in own)),
        ("Seeds", ", ".join(str(seed) for seed in settings.seeds)),
        ("Parameters", _all(f"{card['parameters']:,}" for card in own if "parameters" in card)),
        ("Devices per run", _all(card.get("devices") for card in own)),
        ("Precision", _all(card.get("precision") for card in own)),
        *(
            (f"Machine, {name}", _all(card.get("machine", {}).get(name) for card in own))
            for name in machine
        ),
        *(
            (f"Version, {name}", _all(card.get("versions", {}).get(name) for card in own))
            for name in packages
        ),
    ]
    users: dict[tuple[str, str], dict[str, None]] = {}
    for stage, card in cards:
        for name, sha256 in card.get("data_sha256", {}).items():
            users.setdefault((name, sha256), {})[_stage_words(stage)] = None
    return StudyCard(
        facts,
        [DataFile(name, sha256, ", ".join(stages)) for (name, sha256), stages in users.items()],
    )


def _stage_words(stage: Stage) -> str:
    return stage.stage if stage.ratio is None else f"attack, p = {percent_of(stage.ratio)}"


def _all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "–"


# MERGED from temper.report.collect: Example answers, for studies that say their texts may be shown.


KINDS = ("unsafe", "safe")
SHORTENED = 400  # characters


@dataclass(frozen=True)
class Answer:
    """What one model said to a prompt, and what the judge made of it."""

    model: str
    response: str
    verdict: str


def examples(runs: Path, settings: Study) -> list[tuple[str, list[Answer]]]:
    """The first prompts of each kind with every model's answer, in the order of the tables; the
    first seed, the largest p.

    Returns:
        Nothing unless the study has ``show_answers``, which says for how many prompts of each kind.
    """
    found: dict[str, list[Answer]] = {}
    for title, stage in _shown(runs, settings):
        path = stage.folders[-1] / GENERATIONS
        rows = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.is_file()
            else []
        )
        for kind in KINDS:
            for row in [row for row in rows if row["kind"] == kind][: settings.show_answers]:
                text = row["response"]
                text = text if len(text) <= SHORTENED else text[:SHORTENED] + " ..."
                found.setdefault(row["prompt"], []).append(
                    Answer(title, text, "refused" if row["refused"] else row["label"])
                )
    return list(found.items())


def _shown(runs: Path, settings: Study) -> Iterator[tuple[str, Stage]]:
    if not settings.show_answers:
        return
    for stage in stages(runs, settings):
        if stage.seed != settings.seeds[0] or stage.ratio not in (None, settings.ratios[-1]):
            continue
        label = settings.objectives.get(stage.objective, "base model")
        attack = (
            f", {settings.attacks[stage.attack]}, p = {percent_of(settings.ratios[-1])}"
            if stage.attack
            else ""
        )
        yield label + attack, stage
