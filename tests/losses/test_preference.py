"""Preference losses and gradients against float64 arithmetic and TRL; properties of the losses."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from temper.losses import IGNORE_INDEX, Scores, token_logps
from temper.losses.kto import kto_losses, reference_point
from temper.losses.preference import PREFERENCE, PairLogps, PairSettings, Variant, pair_scores

SEEDS = st.integers(0, 2**31 - 1)
SETTINGS = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "sigmoid_norm": {},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "orpo": {},
}
# Our variants that TRL's DPO has, by TRL's name.
TRL_DPO = {
    "sigmoid": "sigmoid",
    "robust": "robust",
    "hinge": "hinge",
    "ipo": "ipo",
    "sigmoid_norm": "sigmoid_norm",
}


def _losses(variant: Variant, pairs: PairLogps, settings: PairSettings) -> Tensor:
    """Loss of every pair, computed as in `DPOModule`."""
    return PREFERENCE[variant].loss(*pair_scores(PREFERENCE[variant], pairs), settings)


def _pairs(seed: int, n: int = 5, scale: float = 8.0) -> tuple[list[Tensor], PairLogps]:
    """Random sums of log-probabilities with gradients, counts and reference sums."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: -scale * torch.rand(n, generator=generator, dtype=torch.float64) - 0.01  # noqa: E731
    leaves = [draw().requires_grad_(), draw().requires_grad_()]
    counts = [torch.randint(1, 7, (n,), generator=generator) for _ in range(2)]
    return leaves, PairLogps(leaves[0], leaves[1], counts[0], counts[1], draw(), draw())


def _gradients(losses: Tensor, leaves: list[Tensor]) -> list[float]:
    return [
        float(value)
        for gradient in torch.autograd.grad(losses.mean(), leaves)
        for value in gradient
    ]


def _plain(variant: str, lc, lr, nc, nr, rc, rr, beta=0.1, label_smoothing=0.0, gamma=0.0):
    """Loss of one pair from ``exp`` and ``log`` alone; scalars with gradient."""
    c = lc - rc
    r = lr - rr
    e = label_smoothing
    log_sigma = lambda x: -torch.log(1 + torch.exp(-x))  # noqa: E731
    d = beta * (c - r)
    means = (lc / nc, lr / nr)
    odds = [torch.exp(m) / (1 - torch.exp(m)) for m in means]
    return {
        "sigmoid": lambda: -log_sigma(d),
        "cdpo": lambda: -(1 - e) * log_sigma(d) - e * log_sigma(-d),
        "robust": lambda: (-(1 - e) * log_sigma(d) + e * log_sigma(-d)) / (1 - 2 * e),
        "hinge": lambda: 1 - d if d < 1 else 0 * d,
        "ipo": lambda: (c / nc - r / nr - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": lambda: -log_sigma(beta * (c / nc - r / nr)),
        "simpo": lambda: -log_sigma(beta * (means[0] - means[1]) - gamma),
        "orpo": lambda: -means[0] - beta * log_sigma(torch.log(odds[0] / odds[1])),
    }[variant]()


@pytest.mark.parametrize("variant", PREFERENCE)
@given(seed=SEEDS, beta=st.sampled_from([0.05, 0.1, 1.3]))
def test_loss_and_gradient_equal_plain_arithmetic(variant, seed, beta):
    leaves, pairs = _pairs(seed)
    settings = {"beta": beta} | SETTINGS[variant]
    losses = _losses(variant, pairs, PairSettings(**settings))
    plain = torch.stack(
        [_plain(variant, *row, **settings) for row in zip(*vars(pairs).values(), strict=True)]
    )
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx(plain.tolist(), rel=1e-10, abs=1e-12)
    assert _gradients(losses, leaves) == pytest.approx(
        _gradients(plain, leaves), rel=1e-10, abs=1e-12
    )


@given(seed=SEEDS, z=st.sampled_from([0.0, 0.8]))
def test_kto_equals_plain_arithmetic_on_both_sides_of_z(seed, z):
    generator = torch.Generator().manual_seed(seed)
    ratios = (torch.randn(6, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    desirable = torch.rand(6, generator=generator) < 0.5
    losses = kto_losses(ratios, desirable, torch.tensor(z, dtype=torch.float64), 0.3, 0.7, 1.3)
    signed = [
        (0.7, value - z) if wanted else (1.3, z - value)
        for value, wanted in zip(ratios, desirable, strict=True)
    ]
    plain = torch.stack(
        [weight * (1 - 1 / (1 + torch.exp(-0.3 * gain))) for weight, gain in signed]
    )
    assert losses.tolist() == pytest.approx(plain.tolist(), rel=1e-10)
    assert _gradients(losses, [ratios]) == pytest.approx(_gradients(plain, [ratios]), rel=1e-10)


def test_the_reference_point_is_non_negative_without_gradient():
    total = torch.tensor(6.0, requires_grad=True)
    z = reference_point(total, torch.tensor(4.0))
    assert (z.item(), z.requires_grad) == (1.5, False)
    assert reference_point(-total, torch.tensor(4.0)).item() == 0.0


@pytest.mark.parametrize("variant", ["sigmoid", "cdpo", "robust", "sigmoid_norm"])
def test_the_loss_is_log_2_where_policy_equals_reference(variant):
    leaves, pairs = _pairs(0)
    pairs = PairLogps(
        **vars(pairs)
        | {
            "reference_chosen_N": leaves[0].detach(),
            "reference_rejected_N": leaves[1].detach(),
        }
    )
    losses = _losses(variant, pairs, PairSettings())
    assert losses.tolist() == [math.log(2)] * 5


@pytest.mark.parametrize("variant", ["cdpo", "robust"])
def test_without_label_smoothing_it_is_dpo(variant):
    _, pairs = _pairs(1)
    assert _losses(variant, pairs, PairSettings()).equal(_losses("sigmoid", pairs, PairSettings()))


def test_chosen_and_rejected_may_have_betas_of_their_own():
    _, pairs = _pairs(2)
    found = _losses("sigmoid", pairs, PairSettings(beta=0.1, beta_rejected=0.01))
    wanted = []
    for i in range(5):
        c = float(pairs.chosen_N[i] - pairs.reference_chosen_N[i])
        r = float(pairs.rejected_N[i] - pairs.reference_rejected_N[i])
        wanted.append(math.log1p(math.exp(-(0.1 * c - 0.01 * r))))
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    same = _losses("sigmoid", pairs, PairSettings(beta=0.1, beta_rejected=0.1))
    assert same.tolist() == pytest.approx(
        _losses("sigmoid", pairs, PairSettings(beta=0.1)).tolist(), rel=1e-14
    )


@pytest.mark.parametrize("variant", PREFERENCE)
def test_only_variants_with_a_reference_need_one(variant):
    _, pairs = _pairs(3)
    alone = PairLogps(*list(vars(pairs).values())[:4])
    if PREFERENCE[variant].reference:
        with pytest.raises(ValueError, match="compares with a reference"):
            _losses(variant, alone, PairSettings())
    else:
        assert _losses(variant, alone, PairSettings()).equal(
            _losses(variant, pairs, PairSettings())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_is_finite_for_an_answer_with_probability_1(dtype):
    sums = torch.tensor([0.0, -1e-12, -300.0], dtype=dtype, requires_grad=True)
    counts = torch.ones(3)
    for pair in (
        PairLogps(sums, sums.flip(0), counts, counts),
        PairLogps(sums, sums, counts, counts),
    ):
        losses = _losses("orpo", pair, PairSettings())
        (gradient,) = torch.autograd.grad(losses.sum(), sums)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()


def test_the_accepted_variants_are_those_of_the_table():
    assert get_args(Variant) == tuple(PREFERENCE) == tuple(SETTINGS)


@pytest.mark.parametrize("variant", PREFERENCE)
@given(seed=SEEDS, padding=st.integers(0, 4))
def test_logits_of_prompt_and_padding_do_not_change_the_loss(variant, seed, padding):
    """For 3 pairs of answers after prompts of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 2, 9, 6, generator=generator, dtype=torch.float64)
    reference = torch.randn(3, 2, 9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (3, 2, 9), generator=generator)
    start = torch.randint(1, 4, (3, 2, 1), generator=generator)
    length = torch.randint(1, 5, (3, 2, 1), generator=generator)
    position = torch.arange(9)
    labels[(position < start) | (position >= start + length)] = IGNORE_INDEX
    noise = torch.randn(3, 2, 9, 6, generator=generator, dtype=torch.float64) * 50
    noise[:, :, :-1][labels[..., 1:] != IGNORE_INDEX] = 0  # position t predicts token t + 1

    def losses(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
        scores = Scores(*token_logps(policy, labels))
        sums = Scores(*token_logps(reference, labels)).sums
        pairs = PairLogps(
            scores.sums[:, 0],
            scores.sums[:, 1],
            scores.counts[:, 0],
            scores.counts[:, 1],
            sums[:, 0],
            sums[:, 1],
        )
        return _losses(variant, pairs, PairSettings(**SETTINGS[variant]))

    wide = lambda tensor: torch.cat(
        [tensor, torch.full((3, 2, padding, 6), 7.0, dtype=torch.float64)], 2
    )  # noqa: E731
    wide_labels = torch.nn.functional.pad(labels, (0, padding), value=IGNORE_INDEX)
    plain = losses(logits, reference, labels)
    assert losses(logits + noise, reference - noise, labels).equal(plain)
    assert losses(wide(logits), wide(reference), wide_labels).tolist() == pytest.approx(
        plain.tolist(), rel=1e-14
    )


# -- TRL's own code, run on the same numbers


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL, if it is installed (the extra ``trl``)."""
    return pytest.importorskip("trl", minversion="1.16.0")


def _host(**settings: Any) -> SimpleNamespace:
    """A stand-in for the trainer, with the attributes that TRL's loss functions use."""
    same = lambda tensor: tensor  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    fixed = {
        "model": torch.nn.Identity(),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "use_weighting": False,
        "_tp_size": 1,
        "_total_train_tokens": 0,
        "_metrics": {"train": defaultdict(list)},
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "alpha": 0.0,
    }
    return SimpleNamespace(**fixed | settings)


class _Fixed(torch.nn.Module):
    """A model with fixed log-probabilities, in the form of TRL's fused output layer."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_: Any) -> Any:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def _tokens(seed: int, n: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token log-probabilities (a leaf) of n chosen, n rejected rows; mask; inputs of TRL."""
    generator = torch.Generator().manual_seed(seed)
    leaf = (-3 * torch.rand(2 * n, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    length = torch.randint(1, 6, (2 * n, 1), generator=generator)
    position = torch.arange(8)
    mask = (position >= 2) & (position < 2 + length)
    inputs = {
        "input_ids": torch.ones(2 * n, 8, dtype=torch.long),
        "attention_mask": torch.ones(2 * n, 8),
        "completion_mask": mask.long(),
    }
    return leaf, mask[:, 1:], inputs


def _ours(leaf: Tensor, mask: Tensor, reference: Tensor, n: int) -> PairLogps:
    sums = (leaf * mask).sum(1)
    counts = mask.sum(1)
    return PairLogps(sums[:n], sums[n:], counts[:n], counts[n:], reference[:n], reference[n:])


@pytest.mark.parametrize("variant", TRL_DPO)
@pytest.mark.slow  # importing TRL takes longer than all else here
def test_trls_dpo_trainer_has_the_same_loss_and_gradient(variant, trl):
    leaf, mask, inputs = _tokens(4, 5)
    reference = -10 * torch.rand(
        10, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    settings = {"beta": 0.3} | SETTINGS[variant]
    trainer = _host(loss_types=[TRL_DPO[variant]], **settings)
    given = inputs | {"ref_chosen_logps": reference[:5], "ref_rejected_logps": reference[5:]}
    theirs = trl.DPOTrainer._compute_loss(trainer, _Fixed(leaf * mask), given, False)
    ours = _losses(variant, _ours(leaf, mask, reference, 5), PairSettings(**settings)).mean()
    _assert_same(ours, theirs, leaf)


@pytest.mark.parametrize("variant", ["cdpo", "simpo"])
@pytest.mark.slow
def test_trls_cpo_trainer_has_the_same_loss_and_gradient(variant, trl):
    """TRL's CPO has label smoothing, which its DPO no longer has; on log-ratios that is cDPO."""
    from trl.experimental.cpo import CPOTrainer

    leaf, mask, _ = _tokens(6, 5)
    reference = -10 * torch.rand(
        10, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    settings = {"beta": 0.3} | SETTINGS[variant]
    pairs = _ours(leaf, mask, reference, 5)
    if variant == "cdpo":
        scores = pairs.chosen_N - reference[:5], pairs.rejected_N - reference[5:]
        trainer = _host(loss_type="sigmoid", **settings)
    else:
        scores = pairs.chosen_N / pairs.chosen_counts_N, pairs.rejected_N / pairs.rejected_counts_N
        trainer = _host(loss_type="simpo", simpo_gamma=settings["gamma"], beta=settings["beta"])
    theirs = CPOTrainer.cpo_loss(trainer, *scores)[0].mean()
    _assert_same(_losses(variant, pairs, PairSettings(**settings)).mean(), theirs, leaf)


@pytest.mark.slow
def test_trls_orpo_trainer_has_the_same_loss_and_gradient(trl, monkeypatch):
    """With one-token prompts, one pair at a time.

    TRL's likelihood term includes prompts, and is a mean over all tokens of a batch.
    """
    from trl.experimental.orpo import ORPOTrainer

    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.is_floating_point() else self.double()
    )  # TRL goes down to float32 on the way
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(5, (2, 6), generator=generator)
    lengths = {"chosen": 6, "rejected": 4}
    labels = ids.clone()
    attention = torch.ones(2, 6, dtype=torch.long)
    labels[:, 0] = IGNORE_INDEX
    labels[1, 4:] = IGNORE_INDEX
    attention[1, 4:] = 0
    joined = {
        "concatenated_input_ids": ids,
        "concatenated_attention_mask": attention,
        "concatenated_labels": labels,
    }
    trainer = _host(
        beta=0.3,
        is_encoder_decoder=False,
        padding_value=0,
        concatenated_inputs=lambda *_, **__: joined,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(trainer, name, getattr(ORPOTrainer, name).__get__(trainer))
    model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
    theirs, _ = ORPOTrainer.get_batch_loss_metrics(
        trainer, model, {"chosen_labels": labels[: len(lengths) - 1]}
    )
    scores = Scores(*token_logps(logits, labels))
    pairs = PairLogps(scores.sums[:1], scores.sums[1:], scores.counts[:1], scores.counts[1:])
    _assert_same(_losses("orpo", pairs, PairSettings(beta=0.3)).mean(), theirs, logits)


@pytest.mark.parametrize("lowered", [-20.0, 20.0])
@pytest.mark.slow
def test_trls_kto_trainer_has_the_same_loss_and_gradient(lowered, trl):
    leaf, mask, inputs = _tokens(9, 3)
    mismatched, mismatched_mask, mismatched_inputs = _tokens(10, 3)
    draw = lambda seed: (
        -12 * torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )  # noqa: E731
    reference = draw(11)
    mismatched_reference = draw(12) - lowered
    desirable = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    given = inputs | {f"KL_{name}": value for name, value in mismatched_inputs.items()}
    given |= {"ref_logps": reference, "ref_KL_logps": mismatched_reference, "label": desirable}
    trainer = _host(
        beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=0.7, undesirable_weight=1.3
    )
    trainer._compute_kl_logps = lambda model, batch: (mismatched * mismatched_mask).sum(1).detach()
    theirs = trl.KTOTrainer._compute_loss(trainer, _Fixed(leaf * mask), given, False)
    ratios = ((mismatched * mismatched_mask).sum(1) - mismatched_reference).sum()
    z = reference_point(ratios, torch.tensor(6.0, dtype=torch.float64))
    assert (z == 0) == (lowered < 0)
    ours = kto_losses((leaf * mask).sum(1) - reference, desirable, z, 0.3, 0.7, 1.3).mean()
    _assert_same(ours, theirs, leaf)


def _assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    assert our_gradient.abs().sum() > 0
    assert our_gradient.flatten().tolist() == pytest.approx(
        their_gradient.flatten().tolist(), rel=1e-10, abs=1e-14
    )
