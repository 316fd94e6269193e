"""Judges of answers: prompt and answer in, label and score out."""

from temper.judges.base import LABELS, Judge, Judgement, decode_rows
from temper.judges.classifier import SequenceClassifier
from temper.judges.function import CallableJudge
from temper.judges.grammar import GrammarJudge
from temper.judges.keyword import KeywordRefusal
from temper.judges.model import GuardLM, ModelJudge, YesNoLM

__all__ = [
    "LABELS",
    "CallableJudge",
    "GrammarJudge",
    "GuardLM",
    "Judge",
    "Judgement",
    "KeywordRefusal",
    "ModelJudge",
    "SequenceClassifier",
    "YesNoLM",
    "decode_rows",
]
