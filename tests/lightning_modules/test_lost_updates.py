"""Updates that weights of 16 bits are too coarse for are measured, and said once."""

import warnings
from functools import partial

import pytest
import torch

from lightning_modules import SFTModule
from lightning_modules.lost_updates import STEPS
from tests.objectives import fit, make_data, make_module

ADAM = partial(torch.optim.AdamW, weight_decay=0.0)


def _fitted(dtype=torch.bfloat16, lr=1e-5, steps=4, **settings):
    """A fitted module, and the warnings of lost updates."""
    module = make_module(SFTModule, double=False, optimizer=partial(ADAM, lr=lr), **settings)
    for parameter in module.network.parameters():
        if parameter.requires_grad and not settings.get("lora"):
            parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, make_data(), steps)
    return module, [str(w.message) for w in caught if "did not change" in str(w.message)]


def _counted(lr: float, steps: int) -> float:
    """The same share by hand: every element before and after every step."""
    module = make_module(SFTModule, double=False, optimizer=partial(ADAM, lr=lr))
    for parameter in module.network.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    counts = torch.zeros(2)
    honest = SFTModule.apply_gradient

    def apply(gradient, *norms, **options):
        before = [p.detach().clone() for p in module.network.parameters()]
        given = [g != 0 for g in gradient]
        result = honest(module, gradient, *norms, **options)
        for p, b, g in zip(module.network.parameters(), before, given, strict=True):
            counts.add_(torch.stack([((p == b) & g).sum(), g.sum()]))
        return result

    module.apply_gradient = apply
    fit(module, make_data(), steps)
    return float(counts[0] / counts[1])


@pytest.mark.parametrize("lr", [1e-5, 4e-5])
def test_the_share_of_lost_updates_is_measured_and_said(lr):
    module, said = _fitted(lr=lr)
    assert module.lost_updates.share == pytest.approx(_counted(lr, STEPS), abs=1e-6)
    assert module.lost_updates.share > 0.25
    (line,) = said
    assert line.startswith(f"{module.lost_updates.share:.0%} of the weight elements")
    assert "bfloat16" in line and "dtype=float32" in line and "lora.rank=16" in line
    assert f"learning rate of {lr:.2g}" in line


def test_updates_that_arrive_are_not_warned_of():
    module, said = _fitted(lr=1e-2)
    assert module.lost_updates.share < 0.25 and not said


@pytest.mark.parametrize("settings", [{"dtype": torch.float32}, {"lora": True}])
def test_weights_of_32_bits_are_not_measured(settings):
    module, said = _fitted(**settings)
    assert module.lost_updates.share is None and not said


def test_a_warm_up_is_waited_for():
    warm = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, step / 4))
    module, _ = _fitted(lr=1e-2, steps=4, lr_scheduler=warm)
    assert module.lost_updates.share is None  # measured from half of the rate on: steps 3, 4, 5
    module, said = _fitted(lr=1e-2, steps=5, lr_scheduler=warm)
    assert module.lost_updates.share < 0.25 and not said


def test_measuring_changes_no_weight(monkeypatch):
    measured, _ = _fitted(steps=4)
    monkeypatch.setattr("lightning_modules.lost_updates.STEPS", 0)
    plain, _ = _fitted(steps=4)
    assert plain.lost_updates.share is None
    for left, right in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)


def test_large_weights_are_sampled(monkeypatch):
    whole, _ = _fitted(lr=1e-4)
    monkeypatch.setattr("lightning_modules.lost_updates.SAMPLED", 64)
    sampled, _ = _fitted(lr=1e-4)
    assert sampled.lost_updates.share == pytest.approx(whole.lost_updates.share, abs=0.1)
    assert sampled.lost_updates.share != whole.lost_updates.share
