"""The weight space of one process: gradients, displacement, restoration."""

import signal

import pytest
import torch
from torch import nn

from strategies import Vector, WeightSpace
from strategies.weight_space import deferred_signals
from temper.losses import MeanTerms
from tests.objectives import same_bits
from tests.objectives import weights as copies


def space(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, WeightSpace]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return network, WeightSpace(dict(network.named_parameters()))


def loss_on(network: nn.Module):
    def loss(rows: dict[str, torch.Tensor]) -> MeanTerms:
        return MeanTerms((network(rows["x"]) ** 2).sum(), torch.tensor(float(len(rows["x"]))))

    return loss


def rows(n: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).to(dtype)}


def test_the_gradient_is_of_the_mean_at_every_micro_batch_size():
    network, weights = space()
    expected = torch.autograd.grad(
        (network(rows()["x"]) ** 2).sum() / 7, list(network.parameters())
    )
    for size in (None, 1, 2, 3, 7, 100):
        value, vector = weights.gradient(loss_on(network), rows(), size)
        assert torch.allclose(value, (network(rows()["x"]) ** 2).sum() / 7, rtol=1e-12)
        assert all(
            torch.allclose(a, b, rtol=1e-12, atol=1e-14)
            for a, b in zip(vector, expected, strict=True)
        )


def test_gradients_of_two_passes_never_add_up():
    network, weights = space()
    _, first = weights.gradient(loss_on(network), rows())
    kept = first.clone()
    _, second = weights.gradient(loss_on(network), rows())
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, kept, strict=True)
    )
    assert all(p.grad is None for p in network.parameters())


def test_a_stale_gradient_left_by_others_is_not_taken_in():
    network, weights = space()
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    _, vector = weights.gradient(loss_on(network), rows())
    assert float(weights.norm(vector)) < 1e3


def test_an_unused_parameter_has_a_zero_gradient():
    network, _ = space()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    weights = WeightSpace(dict(network.named_parameters()) | {"unused": unused})
    _, vector = weights.gradient(loss_on(network), rows())
    assert torch.equal(vector.tensors[-1], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_displacement_moves_weights_and_restores_every_bit(dtype: torch.dtype):
    network, weights = space(dtype)
    before = copies(network)
    _, vector = weights.gradient(loss_on(network), rows(dtype=dtype))
    assert all(tensor.dtype == torch.promote_types(dtype, torch.float32) for tensor in vector)
    with weights.displaced(vector, -0.3):
        assert weights.is_displaced
        for parameter, start, step in zip(network.parameters(), before, vector, strict=True):
            assert torch.equal(parameter, (start.to(step.dtype) - 0.3 * step).to(dtype))
            assert not torch.equal(parameter, start)
    assert not weights.is_displaced
    assert same_bits(copies(network), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_displacement_is_undone_when_the_body_raises(dtype: torch.dtype):
    network, weights = space(dtype)
    before = copies(network)
    with (
        pytest.raises(KeyError),
        weights.displaced(Vector([torch.ones_like(p).float() for p in network.parameters()]), 0.1),
    ):
        raise KeyError("pass 2 failed")
    assert not weights.is_displaced
    assert same_bits(copies(network), before)


def test_displacement_by_nan_is_undone_too():
    network, weights = space(torch.float32)
    before = copies(network)
    with weights.displaced(
        Vector([torch.full_like(p, torch.nan) for p in network.parameters()]), 0.1
    ):
        assert all(p.isnan().all() for p in network.parameters())
    assert same_bits(copies(network), before)


def test_gradients_can_be_taken_while_displaced():
    network, weights = space()
    _, vector = weights.gradient(loss_on(network), rows())
    with weights.displaced(vector, -0.1):
        moved = torch.autograd.grad(
            (network(rows()["x"]) ** 2).sum() / 7, list(network.parameters())
        )
        _, at_moved = weights.gradient(loss_on(network), rows())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(at_moved, moved, strict=True))


def test_norm_and_clipping_are_those_of_torch():
    network, weights = space()
    for max_norm in (0.01, 1e9):
        _, vector = weights.gradient(loss_on(network), rows())
        (network(rows()["x"]) ** 2).sum().div(7).backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        norm = weights.norm(vector)
        assert torch.allclose(norm, expected_norm, rtol=1e-12)
        clipped = weights.clip(vector, norm, max_norm)
        assert all(
            torch.allclose(a, p.grad, rtol=1e-12)
            for a, p in zip(clipped, network.parameters(), strict=True)
        )
        network.zero_grad()


def test_delayed_signals_arrive_in_order_at_their_handlers():
    seen = []
    handlers = {
        s: signal.signal(s, lambda number, _: seen.append(number))
        for s in (signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        with deferred_signals():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            assert seen == []
        assert seen == [signal.SIGUSR2, signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert seen[-1] == signal.SIGUSR1 and len(seen) == 3
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_weights_that_were_frozen_already_stay_frozen():
    first = torch.nn.Parameter(torch.ones(1))
    second = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    with WeightSpace({"first": first}).frozen([first, second]):
        assert not first.requires_grad
    assert (first.requires_grad, second.requires_grad) == (True, False)
