"""Loss functions: pure functions of log-probabilities and masks."""

from temper.losses.scores import Scores, SequenceScores
from temper.losses.tokens import (
    IGNORE_INDEX,
    MeanTerms,
    hidden_logps,
    kl,
    labelled_logps,
    labelled_positions,
    mean_of,
    nll,
    token_logps,
)

__all__ = [
    "IGNORE_INDEX",
    "MeanTerms",
    "Scores",
    "SequenceScores",
    "hidden_logps",
    "kl",
    "labelled_logps",
    "labelled_positions",
    "mean_of",
    "nll",
    "token_logps",
]
