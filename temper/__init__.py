"""Temper: safety-tune causal language models, attack them, measure what survived."""

__version__ = "0.1.0"
