"""The callbacks, one per file; each works alone, from YAML, with any objective."""

from callbacks.answers import SaveAnswers
from callbacks.forced_prefix import ForcedPrefix
from callbacks.hf_export import HFExport
from callbacks.lm_eval import UtilityEvaluation
from callbacks.preemption import Preemption
from callbacks.probe_loss import ProbeLoss
from callbacks.refusal_ablation import RefusalAblation
from callbacks.run_card import RunCard
from callbacks.safety_evaluation import SafetyEvaluation
from callbacks.safety_steering import SafetySteering
from callbacks.sample_generations import SampleGenerations
from callbacks.start_checks import StartChecks
from callbacks.throughput import Throughput
from callbacks.unlearning_evaluation import UnlearningEvaluation

__all__ = [
    "ForcedPrefix",
    "HFExport",
    "Preemption",
    "ProbeLoss",
    "RefusalAblation",
    "RunCard",
    "SafetyEvaluation",
    "SafetySteering",
    "SampleGenerations",
    "SaveAnswers",
    "StartChecks",
    "Throughput",
    "UnlearningEvaluation",
    "UtilityEvaluation",
]
