"""Memorisation of an answer, row by row: pure functions of log-probabilities and masks.

Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121), Shi et al. 2024 (min-k %, arXiv 2310.16789),
Carlini et al. 2021 and Tirumala et al. 2022 by way of open-unlearning (arXiv 2506.12618), whose
definitions are followed except where said.

Shapes: `...` any leading dimensions, `B` rows, `K` answers of a row (the true one first), `T` time.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def without_end(mask: Tensor) -> Tensor:
    """Mask without the last labelled position of each sequence: its end token, which is no evidence
    of memorisation.

    Args:
        mask: ``... x T``, bool: labelled positions.
    """
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) != 1)


def mean_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """``lbar(y|x) = log p(y|x) / |y|``, shape ``...``, nats per token; NaN for a sequence without
    labels.

    Args:
        logps: ``... x T``, nats; values where the mask is False are ignored.
        mask: ``... x T``, bool: labelled positions.
    """
    values = logps.to(torch.promote_types(logps.dtype, torch.float32))
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


def answer_probability(logps: Tensor, mask: Tensor) -> Tensor:
    """``p(y|x)^(1/|y|) = exp(lbar(y|x))``, shape ``...``, in [0, 1] (TOFU, section 2.2.1).

    Args:
        logps: ``... x T``, nats.
        mask: ``... x T``, bool.
    """
    return mean_logps(logps, mask).exp()


def log_truth_ratio(
    logps_BKT: Tensor, mask_BKT: Tensor, paraphrased_B: Tensor | None = None
) -> Tensor:
    """``log R = mean over perturbed answers of lbar(y'|x) - lbar(y|x)``, shape B, nats.

    y is the right answer in other words (TOFU, section 2.2.1), which was not trained either; where
    there is no paraphrase, the true answer itself.

    R is the geometric mean of the perturbed answers' length-normalised probabilities over that of
    the true answer (TOFU's code and open-unlearning; the formula printed in TOFU has the arithmetic
    mean). It stays a logarithm: ``wrong / (right + 1e-10)``, as open-unlearning computes it, cannot
    tell unlikely answers apart.

    Args:
        logps_BKT: Nats; answer 0 is the true one, answer 1 its paraphrase in rows that have one,
            the others are perturbed.
        mask_BKT: Bool. A perturbed answer without labels is left out of the mean; NaN if there is
            none.
        paraphrased_B: Bool: rows that have a paraphrase; None: none has.
    """
    means_BK = mean_logps(logps_BKT, mask_BKT)
    right_B, wrong_BK = compared_answers(mask_BKT, paraphrased_B)
    wrong_B = means_BK.masked_fill(~wrong_BK, 0.0).sum(-1) / wrong_BK.sum(-1)
    return wrong_B - means_BK.gather(1, right_B[:, None]).squeeze(1)


def compared_answers(
    mask_BKT: Tensor, paraphrased_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Answers that a truth ratio compares: the index of the right one (B), and a mask of the wrong
    ones that have labels (``B x K``).
    """
    given_BK = mask_BKT.any(-1)
    if paraphrased_B is None:
        right_B = torch.zeros(len(given_BK), dtype=torch.long, device=mask_BKT.device)
    else:
        right_B = paraphrased_B.long()
    answers_K = torch.arange(given_BK.shape[1], device=mask_BKT.device)
    return right_B, given_BK & (answers_K > right_B[:, None])


def closer_to_one(log_ratio: Tensor) -> Tensor:
    """``min(R, 1/R) = exp(-|log R|)``: 1 if true and perturbed answers are equally likely; for the
    forget set.
    """
    return (-log_ratio.abs()).exp()


def truth_preferred(log_ratio: Tensor) -> Tensor:
    """``max(0, 1 - R)``: 1 if only the true answer is likely, 0 if it is no likelier than the
    others; for the retain set.
    """
    return (-torch.expm1(log_ratio)).clamp(min=0.0)


def exact_memorisation(hits: Tensor, mask: Tensor) -> Tensor:
    """``1/|y| sum_t [argmax p(.|y_<t) = y_t]``, shape ``...``: share of the answer's tokens
    (Tirumala et al. 2022).

    Args:
        hits: ``... x T``, bool: the label is the likeliest token.
        mask: ``... x T``, bool.
    """
    return (hits & mask).sum(-1) / mask.sum(-1)


def extraction_strength(hits: Tensor, mask: Tensor) -> Tensor:
    """``1 - min{k : argmax p(.|y_<t) = y_t for all t > k} / |y|``, shape ``...`` (Carlini et al.
    2021).

    1 if the prompt alone yields the whole answer, 0 if even its last token must be given.
    (open-unlearning stops at k = |y| - 1, so its smallest value is 1/|y|.)

    Args:
        hits: ``... x T``, bool: the label is the likeliest token.
        mask: ``... x T``, bool.
    """
    misses_from_here = (~hits & mask).flip(-1).cumsum(-1).flip(-1)
    return (mask & (misses_from_here == 0)).sum(-1) / mask.sum(-1)


def min_k_score(logps: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mean of the lowest ``max(1, floor(share * |y|))`` log-probabilities, shape ``...``, nats;
    higher for members.

    Min-k % Prob, Shi et al. 2024, eq. 1 (their score; open-unlearning's is its negative).

    Args:
        logps: ``... x T``, nats.
        mask: ``... x T``, bool.
        share: k / 100, in (0, 1].
    """
    values = (
        logps.to(torch.promote_types(logps.dtype, torch.float32))
        .masked_fill(~mask, math.inf)
        .sort(-1)
        .values
    )
    # 1e-9: 0.29 * 100 is 28.999999999999996 in floats.
    sizes_N = torch.tensor(
        [max(1, math.floor(share * n + 1e-9)) for n in range(mask.shape[-1] + 1)],
        device=mask.device,
    )
    sizes = sizes_N[mask.sum(-1)]
    taken = torch.arange(mask.shape[-1], device=mask.device) < sizes.unsqueeze(-1)
    return values.masked_fill(~taken, 0.0).sum(-1) / sizes


def longest_common_subsequence(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence, exact, bit-parallel (Hyyrö 2004): one integer
    operation per token.
    """
    positions: dict[int, int] = {}
    for place, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything  # a zero bit is a step of the dynamic programme's last row
    for token in second:
        common = row & positions.get(token, 0)
        row = ((row + common) | (row - common)) & everything
    return len(first) - row.bit_count()


def rouge_l_recall(answer: Sequence[int], truth: Sequence[int]) -> float:
    """``LCS(answer, truth) / |truth|`` on token ids, in [0, 1] (Lin 2004); NaN for an empty truth.

    TOFU computes it on stemmed words; tokens are the words of the synthetic language, and need no
    stemmer elsewhere.
    """
    return longest_common_subsequence(answer, truth) / len(truth) if truth else math.nan
