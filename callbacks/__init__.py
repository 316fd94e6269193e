"""Observations and side effects, one per file; each works alone, from YAML."""

from callbacks.hf_export import HFExport
from callbacks.probe_loss import ProbeLoss
from callbacks.run_card import RunCard
from callbacks.safety_evaluation import SafetyEvaluation
from callbacks.throughput import Throughput

__all__ = ["HFExport", "ProbeLoss", "RunCard", "SafetyEvaluation", "Throughput"]
