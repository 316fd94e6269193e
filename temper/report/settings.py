"""What the report reads of a study's YAML."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from temper.errors import TemperError
from temper.study.settings import Route, check_show_answers, route

STUDY = "study.yaml"


@dataclass(frozen=True)
class Contest:
    """The comparison a study was made for: keys of one attack and two objectives."""

    attack: str
    baseline: str
    method: str


@dataclass(frozen=True)
class Settings:
    """A study's plan, in the order of its YAML.

    Attributes:
        name: Short name.
        title: Heading of the report.
        objectives: Key to label; the order is that of every table and of the colours.
        attacks: Key to label.
        learning_rates: Attack to learning rate, if its part of the YAML says one.
        steps: Attack to optimizer steps, likewise.
        ratios: Harmful ratios p, rising.
        seeds: Seeds.
        contest: The headline comparison, if there is one.
        routes: Objective to the folders its models are made in.
        base_given: Whether the base model was there, and has figures of its own, once for all
            seeds.
        show_answers: Unsafe prompts whose answers are shown, per model.
    """

    name: str
    title: str
    objectives: dict[str, str]
    attacks: dict[str, str]
    learning_rates: dict[str, float | None]
    steps: dict[str, int | None]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    contest: Contest | None
    routes: dict[str, Route]
    base_given: bool = False
    show_answers: int = 0

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


def percent_of(ratio: float) -> str:
    """A ratio as people read it: ``5 %``."""
    return f"{100 * ratio:g} %"


def read_study(runs: Path) -> dict[str, Any]:
    """Read a study folder's ``study.yaml``.

    Raises:
        TemperError: It is missing or is no mapping.
    """
    path = runs / STUDY
    if not path.is_file():
        raise TemperError(
            f"{path}: missing; RUNS_FOLDER must be a study's folder (runs/<study>), run the study"
            " first"
        )
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(study, dict):
        raise TemperError(
            f"{path}: found {type(study).__name__}, a study is a mapping (name, objectives,"
            " attacks, ...); mend the file"
        )
    return study


def read_settings(study: Mapping[str, Any]) -> Settings:
    """Take from a study what the report needs.

    Raises:
        TemperError: A part is missing, the headline names what the study does not have, or the
            answers to show are no number.
    """
    for part in ("name", "objectives", "attacks", "harmful_ratios", "seeds"):
        if study.get(part) in (None, "", [], {}):
            raise TemperError(f"study.yaml: `{part}` is missing or empty; add it (see studies/)")
    check_show_answers(study, STUDY)
    attacks: dict[str, dict[str, Any]] = {key: part or {} for key, part in study["attacks"].items()}
    return Settings(
        name=str(study["name"]),
        title=str(study.get("title") or study["name"]),
        objectives=_labels(study["objectives"]),
        attacks=_labels(attacks),
        # float(): YAML 1.1 reads 5e-5 (no point) as text.
        learning_rates={
            key: None if part.get("lr") is None else float(part["lr"])
            for key, part in attacks.items()
        },
        steps={
            key: None if part.get("steps") is None else int(part["steps"])
            for key, part in attacks.items()
        },
        ratios=tuple(sorted({float(p) for p in study["harmful_ratios"]})),
        seeds=tuple(int(seed) for seed in study["seeds"]),
        contest=_contest(study),
        routes={str(key): route(study["objectives"], key) for key in study["objectives"]},
        base_given="base_model" in study,
        show_answers=study.get("show_answers", 0),
    )


def _labels(parts: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str((part or {}).get("label") or key) for key, part in parts.items()}


def _contest(study: Mapping[str, Any]) -> Contest | None:
    headline = study.get("headline")
    if not headline:
        return None
    for role, part in (("attack", "attacks"), ("baseline", "objectives"), ("method", "objectives")):
        if headline.get(role) not in study[part]:
            raise TemperError(
                f"study.yaml: headline.{role} is {headline.get(role)!r}, accepted:"
                f" {', '.join(study[part])} (the keys of `{part}`); mend it or take `headline` out"
            )
    return Contest(headline["attack"], headline["baseline"], headline["method"])
