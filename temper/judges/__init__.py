"""Judges: text in, label and score out."""

from temper.judges.base import Judge, Judgement, readable
from temper.judges.grammar import GrammarJudge

__all__ = ["GrammarJudge", "Judge", "Judgement", "readable"]
