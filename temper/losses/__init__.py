"""Losses as pure functions of log-probabilities and masks."""

from temper.losses.tokens import IGNORE_INDEX, MeanTerms, nll, token_logps

__all__ = ["IGNORE_INDEX", "MeanTerms", "nll", "token_logps"]
