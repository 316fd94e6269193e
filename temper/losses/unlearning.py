"""Unlearning losses: ``L = gamma * L_forget + alpha * L_retain``, one table for each of the two.

`l` is the sum of a sequence's answer-token log-probabilities (nats), `lbar` their mean, `NLL =
-logp` of a token. A *mean over tokens* divides by the answer tokens of the whole batch, so long
answers weigh more; a *mean over sequences* gives every row the same weight. Each loss follows its
paper (and open-unlearning's code), and its docstring names the mean.

A row may hold two sequences: the answer to forget or to keep (0) and a substitute for it, such as a
refusal (1).

Shapes: `B` rows, `T` time, `V` vocabulary; logits ``B x (T - 1) x V``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from temper.losses.representation import hidden_distance
from temper.losses.scores import Scores, SequenceScores
from temper.losses.tokens import MeanTerms, kl, mean_of, nll, upcast

Options = Mapping[str, float]
Sequences = Literal["answer", "substitute", "both"]
ForgetName = Literal[
    "ga", "bounded", "npo", "simnpo", "idk_nll", "idk_dpo", "wga", "satimp", "undial"
]
RetainName = Literal["none", "nll", "bounded", "kl", "kl_all", "embedding"]


def ga(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """Gradient ascent: ``-NLL``, mean over tokens; unbounded below.

    Jang et al. 2023, arXiv 2210.01504.
    """
    return MeanTerms(policy.sums.sum(), policy.counts.sum())


def bounded(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """Learn the substitute and weakly unlearn the answer: ``NLL(y+) - ascent * NLL(y-)``.

    Jain et al. 2024, arXiv 2407.10264. The ascent is weak but not bounded: a long run keeps raising
    NLL(y-), to 100 nats per token and more. Mean over pairs of the two sequences' means over
    tokens; with answers of equal length, as in the paper's windows, it is the mean over tokens.
    """
    return mean_of(options["ascent"] * policy[:, 0].means - policy[:, 1].means)


def bounded_retain(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """Keep the answer and weakly unlearn its substitute: `bounded` with the two roles swapped.

    The code of Jain et al. 2024 (arXiv 2407.10264) computes it on safe prompts, whose substitute is
    the refusal.
    """
    return mean_of(options["ascent"] * policy[:, 1].means - policy[:, 0].means)


def npo(policy: Scores, reference: Scores | SequenceScores, options: Options) -> MeanTerms:
    """NPO: ``-(2/beta) log sigma(-beta (l - l_ref))``, mean over sequences.

    Zhang et al. 2024, arXiv 2404.05868. Where policy and reference agree, its gradient is that of
    ``l``, a sum over tokens: the gradient of `ga` times the tokens per sequence.
    """
    return _scaled_logsigmoid(reference.sums - policy.sums, options["beta"])


def simnpo(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """SimNPO: ``-(2/beta) log sigma(beta (-lbar - delta))``, mean over sequences.

    Fan et al. 2024, arXiv 2410.07163. ``delta`` is in nats per token, as in open-unlearning; the
    paper's margin gamma is ``beta * delta``.
    """
    return _scaled_logsigmoid(-policy.means - options["delta"], options["beta"])


def idk_nll(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """NLL of the substitute answers, such as "I don't know", mean over tokens.

    Maini et al. 2024, arXiv 2401.06121.
    """
    return nll(policy)


def idk_dpo(policy: Scores, reference: Scores | SequenceScores, options: Options) -> MeanTerms:
    """DPO with the substitute as the chosen answer, mean over pairs (arXiv 2401.06121).

    ``-(2/beta) log sigma(beta [(l - l_ref)(substitute) - (l - l_ref)(answer)])``

    The factor 2 is open-unlearning's. It gives the scale of NPO, which is this loss without the
    term of the substitute.
    """
    ratios = policy.sums - reference.sums
    return _scaled_logsigmoid(ratios[:, 1] - ratios[:, 0], options["beta"])


def wga(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """Weighted gradient ascent: ``-p^beta NLL`` with p^beta detached, mean over tokens.

    Wang et al. 2025, arXiv 2502.19301.
    """
    p = policy.logps.detach().exp()
    return _weighted_ascent(policy, p ** options["beta"])


def satimp(policy: Scores, reference: None, options: Options) -> MeanTerms:
    """SatImp: ``-p^beta (1 - p)^beta2 NLL`` with weights detached, mean over tokens.

    Yang et al. 2025, arXiv 2505.11953.
    """
    p = policy.logps.detach().exp()
    return _weighted_ascent(policy, p ** options["beta"] * (1 - p).clamp(min=0) ** options["beta2"])


def undial(policy: Scores, reference: Scores, options: Options) -> MeanTerms:
    """UNDIAL: ``CE(softmax(z_ref - beta onehot(y)), z)``, mean over answer tokens.

    Dong et al. 2024, arXiv 2402.10052. open-unlearning also averages over prompt and padding, where
    the label -100 lowers the logit of token V - 100.
    """
    assert policy.logits is not None and policy.labels is not None
    assert reference.logits is not None
    target = upcast(reference.logits).detach()
    # Masked positions have no label; any index is right, because they do not count below.
    label = policy.labels.clamp(min=0).unsqueeze(-1)
    lowered = target.scatter_add(
        -1, label, torch.full_like(label, -options["beta"], dtype=target.dtype)
    )
    cross_entropy = -(lowered.softmax(-1) * upcast(policy.logits).log_softmax(-1)).sum(-1)
    return MeanTerms((cross_entropy * policy.mask).sum(), policy.mask.sum())


def _weighted_ascent(policy: Scores, weights: Tensor) -> MeanTerms:
    """``-weight * NLL``, mean over tokens."""
    return MeanTerms((weights * policy.logps * policy.mask).sum(), policy.mask.sum())


def _scaled_logsigmoid(margin: Tensor, beta: float) -> MeanTerms:
    """``-(2/beta) log sigma(beta * margin)``, mean over sequences."""
    return mean_of(-2 / beta * logsigmoid(beta * margin))


@dataclass(frozen=True)
class Term:
    """A forget or retain loss, and the inputs that it needs.

    Attributes:
        loss: Maps policy, reference (None if it needs no reference) and options to the terms of its
            mean.
        sequences: Which of a row's two sequences it needs; ``both`` arrive as ``B x 2``, one
            as ``B``.
        reference: Which scores of the reference model it needs; for ``sums``, `SequenceScores` are
            enough.
        logits: Whether it needs logits of the policy and of the reference, if it needs one.
        hidden: Whether it needs hidden states, likewise.
        options: Its options with their defaults.
    """

    loss: Callable[[Any, Any, Options], MeanTerms]
    sequences: Sequences = "answer"
    reference: Literal["nothing", "sums", "everything"] = "nothing"
    logits: bool = False
    hidden: bool = False
    options: Options = field(default_factory=dict)


# GradDiff (Liu et al. 2022) has no entry: it is ga with the retain loss nll.
FORGET: dict[ForgetName, Term] = {
    "ga": Term(ga),
    "bounded": Term(bounded, "both", options={"ascent": 0.1}),
    "npo": Term(npo, reference="sums", options={"beta": 0.1}),
    "simnpo": Term(simnpo, options={"beta": 4.5, "delta": 0.0}),
    "idk_nll": Term(idk_nll, "substitute"),
    "idk_dpo": Term(idk_dpo, "both", "sums", options={"beta": 0.1}),
    "wga": Term(wga, options={"beta": 1.0}),
    "satimp": Term(satimp, options={"beta": 5.0, "beta2": 1.0}),
    "undial": Term(undial, reference="everything", logits=True, options={"beta": 10.0}),
}

RETAIN: dict[RetainName, Term | None] = {
    "none": None,
    "nll": Term(lambda policy, reference, options: nll(policy)),
    "bounded": Term(bounded_retain, "both", options={"ascent": 0.1}),
    "kl": Term(
        lambda policy, reference, options: kl(policy, reference),
        reference="everything",
        logits=True,
    ),
    "kl_all": Term(
        lambda policy, reference, options: kl(policy, reference, prompts=True),
        reference="everything",
        logits=True,
    ),
    "embedding": Term(
        lambda policy, reference, options: hidden_distance(policy, reference),
        reference="everything",
        hidden=True,
    ),
}
