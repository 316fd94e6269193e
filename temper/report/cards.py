"""What all stages of a study were made with."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from temper.report.collect import Stage
from temper.report.settings import Settings, percent_of


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


def study_card(cards: list[tuple[Stage, dict[str, Any]]], settings: Settings) -> StudyCard:
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
        *((f"Machine, {name}", _all(card.get("machine", {}).get(name) for card in own)) for name in machine),
        *((f"Version, {name}", _all(card.get("versions", {}).get(name) for card in own)) for name in packages),
    ]
    users: dict[tuple[str, str], dict[str, None]] = {}
    for stage, card in cards:
        for name, sha256 in card.get("data_sha256", {}).items():
            users.setdefault((name, sha256), {})[_stage_words(stage)] = None
    return StudyCard(facts, [DataFile(name, sha256, ", ".join(stages)) for (name, sha256), stages in users.items()])


def _stage_words(stage: Stage) -> str:
    return stage.stage if stage.ratio is None else f"attack, p = {percent_of(stage.ratio)}"


def _all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "–"
