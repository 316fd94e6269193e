"""Token losses against float64 loops: values, gradients, masks, and the mean over tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from temper.data import Batch, micro_batches, trim
from temper.losses import IGNORE_INDEX, MeanTerms, Scores, nll, token_logps

SEEDS = st.integers(0, 2**31 - 1)


def _case(seed: int, n_rows: int = 4, width: int = 7, vocabulary: int = 5) -> tuple[Tensor, Tensor]:
    """Random float64 logits, and labels with random masks; at least one counts."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = (
        torch.randn(n_rows, width, vocabulary, generator=generator, dtype=torch.float64) * 3
    )
    labels_BT = torch.randint(vocabulary, (n_rows, width), generator=generator)
    labels_BT[torch.rand(n_rows, width, generator=generator) < 0.4] = IGNORE_INDEX
    labels_BT[0, 1] = 0
    return logits_BTV, labels_BT


def _plain_logps(logits_BTV: Tensor, labels_BT: Tensor) -> list[list[float | None]]:
    """log softmax by loops over Python floats; None where the label does not count."""
    rows: list[list[float | None]] = []
    for scores_TV, labels_T in zip(logits_BTV.tolist(), labels_BT.tolist(), strict=True):
        row: list[float | None] = []
        for t in range(len(labels_T) - 1):
            label = labels_T[t + 1]
            scores = scores_TV[t]
            top = max(scores)
            norm = top + math.log(math.fsum(math.exp(score - top) for score in scores))
            row.append(None if label == IGNORE_INDEX else scores[label] - norm)
        rows.append(row)
    return rows


@given(seed=SEEDS)
def test_log_probabilities_are_those_of_plain_loops_to_1e_12(seed):
    logits_BTV, labels_BT = _case(seed)
    logps_BT, mask_BT = token_logps(logits_BTV, labels_BT)
    assert logps_BT.dtype == torch.float64
    for found, kept, wanted in zip(
        logps_BT.tolist(), mask_BT.tolist(), _plain_logps(logits_BTV, labels_BT), strict=True
    ):
        assert [value is not None for value in wanted] == kept
        assert found == pytest.approx([value or 0.0 for value in wanted], abs=1e-12)


@given(seed=SEEDS)
def test_nll_is_minus_the_sum_over_unmasked_tokens(seed):
    logits_BTV, labels_BT = _case(seed)
    terms = nll(Scores(*token_logps(logits_BTV, labels_BT)))
    counted = [
        value for row in _plain_logps(logits_BTV, labels_BT) for value in row if value is not None
    ]
    assert terms.total.item() == pytest.approx(-math.fsum(counted), abs=1e-12 * len(counted))
    assert terms.count.item() == len(counted)
    assert terms.total.dim() == terms.count.dim() == 0


@given(seed=SEEDS)
def test_the_gradient_is_softmax_minus_one_hot_to_1e_12(seed):
    logits_BTV, labels_BT = _case(seed)
    logits_BTV.requires_grad_()
    terms = nll(Scores(*token_logps(logits_BTV, labels_BT)))
    (gradient,) = torch.autograd.grad(terms.total, logits_BTV)
    assert not terms.count.requires_grad
    for row, labels_T in enumerate(labels_BT.tolist()):
        for t, scores in enumerate(logits_BTV[row].tolist()):
            label = labels_T[t + 1] if t + 1 < len(labels_T) else IGNORE_INDEX
            top = max(scores)
            norm = math.fsum(math.exp(score - top) for score in scores)
            wanted = [
                0.0 if label == IGNORE_INDEX else math.exp(s - top) / norm - (v == label)
                for v, s in enumerate(scores)
            ]
            assert gradient[row, t].tolist() == pytest.approx(wanted, abs=1e-12)


@given(seed=SEEDS, scale=st.sampled_from([1.0, 1e4]))
def test_logits_before_masked_labels_change_nothing(seed, scale):
    logits_BTV, labels_BT = _case(seed)
    masked_BT = torch.cat(
        [labels_BT[:, 1:] == IGNORE_INDEX, torch.ones(len(labels_BT), 1, dtype=torch.bool)], dim=1
    )
    noise = (
        torch.randn(
            logits_BTV.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
        )
        * scale
    )
    changed = torch.where(masked_BT[..., None], noise, logits_BTV)
    results = []
    for logits in (logits_BTV.clone().requires_grad_(), changed.clone().requires_grad_()):
        terms = nll(Scores(*token_logps(logits, labels_BT)))
        (gradient,) = torch.autograd.grad(terms.total, logits)
        assert not gradient[masked_BT].any()
        results.append((terms.total.item(), terms.count.item(), gradient))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


@given(seed=SEEDS, extra=st.integers(1, 5))
def test_padding_on_the_right_changes_nothing(seed, extra):
    logits_BTV, labels_BT = _case(seed)
    noise = torch.randn(
        len(labels_BT),
        extra,
        logits_BTV.shape[2],
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    padded = torch.nn.functional.pad(labels_BT, (0, extra), value=IGNORE_INDEX)
    short = nll(Scores(*token_logps(logits_BTV, labels_BT)))
    long = nll(Scores(*token_logps(torch.cat([logits_BTV, noise], dim=1), padded)))
    assert long.total.item() == pytest.approx(short.total.item(), abs=1e-12)
    assert long.count == short.count


def test_the_first_label_does_not_count():
    logits_BTV, _ = _case(0, n_rows=1, width=3)
    terms = nll(Scores(*token_logps(logits_BTV, torch.tensor([[2, IGNORE_INDEX, IGNORE_INDEX]]))))
    assert (terms.total.item(), terms.count.item()) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_summed_in_single_precision(dtype):
    logits_BTV, labels_BT = _case(1)
    logits = logits_BTV.to(dtype)
    logps_BT, _ = token_logps(logits, labels_BT)
    assert logps_BT.dtype == torch.float32
    wanted = [value or 0.0 for row in _plain_logps(logits.double(), labels_BT) for value in row]
    assert logps_BT.flatten().tolist() == pytest.approx(wanted, abs=1e-5)


def _unequal(seed: int) -> Batch:
    """Eight rows of 2 to 9 tokens, of which the first 1 or more are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        name: torch.zeros(8, 9, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "labels")
    }
    batch["labels"] += IGNORE_INDEX
    for row in range(8):
        tokens = torch.randint(1, 6, (row + 2,), generator=generator)
        prompt = int(torch.randint(1, row + 2, (), generator=generator))
        batch["input_ids"][row, : row + 2] = tokens
        batch["attention_mask"][row, : row + 2] = 1
        batch["labels"][row, prompt : row + 2] = tokens[prompt:]
    return batch


def _loss_and_gradient(
    weight: Tensor, batches: list[Batch]
) -> tuple[Tensor, Tensor, list[MeanTerms]]:
    """Loss sum(total) / sum(count) of a bigram model, its gradient, and its terms."""
    weight = weight.clone().requires_grad_()
    terms = [
        nll(Scores(*token_logps(weight[batch["input_ids"]], batch["labels"]))) for batch in batches
    ]
    total = sum(t.total for t in terms)
    count = sum(t.count for t in terms)
    loss = total / count
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.detach(), gradient, terms


@given(seed=SEEDS, size=st.sampled_from([1, 2, 3, 4]))
def test_eight_rows_at_once_equal_one_by_one(seed, size):
    batch = _unequal(seed)
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, gradient, _ = _loss_and_gradient(weight, [batch])
    split_loss, split_gradient, terms = _loss_and_gradient(
        weight, [trim(micro_batch) for micro_batch in micro_batches(batch, size)]
    )
    assert len(terms) == -(-8 // size)
    assert split_loss.item() == pytest.approx(loss.item(), abs=1e-12)
    assert torch.allclose(split_gradient, gradient, rtol=0, atol=1e-12)


def test_a_mean_of_means_would_be_another_loss():
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, _, terms = _loss_and_gradient(weight, list(micro_batches(_unequal(0), 1)))
    mean_of_means = torch.stack([t.total / t.count for t in terms]).mean()
    assert abs(mean_of_means.item() - loss.item()) > 1e-2
