"""What every objective inherits: sums of means, parameters left out of a step, notes."""

import copy
from functools import partial

import pytest
import torch

from lightning_modules import SFTModule
from lightning_modules.base import ObjectiveModule
from temper.errors import TemperError
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    plain_gradient,
    relative_error,
    same_bits,
    trainable,
    weights,
)


class TwoParts(ObjectiveModule):
    """NLL of both streams, weighted."""

    streams = ("alignment", "harmful")

    def __init__(self, network, weights=(1.0, -0.25), skip=(), **kwargs):
        super().__init__(network, **kwargs)
        self.parts = weights
        self.left_out = skip

    def training_step(self, batch, batch_idx):
        (first, second), gradient = self.weighted_gradient(
            (self.parts[0], batch["alignment"], None),
            (self.parts[1], batch["harmful"], self.noted_terms),
        )
        self.losses = first, second
        self.apply_gradient(gradient, skip=self.left_out)

    def noted_terms(self, rows):
        self.log_mean("rows", rows["ids"].double())
        return self.nll_terms(rows)


@pytest.mark.parametrize("size", [None, 1, 3])
def test_a_weighted_gradient_is_a_sum_of_gradients(size):
    module = make_module(
        TwoParts,
        max_grad_norm=None,
        micro_batch_size=size,
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    network = copy.deepcopy(module.network)
    fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    a = plain_gradient(network, batch["alignment"])
    b = plain_gradient(network, batch["harmful"])
    for before, after, f, h in zip(
        trainable(network), trainable(module.network), a, b, strict=True
    ):
        torch.testing.assert_close(before - after, f - 0.25 * h, rtol=1e-9, atol=1e-12)
    assert module.work.passes == 2


def test_a_loss_of_weight_zero_is_not_computed():
    module = make_module(TwoParts, weights=(1.0, 0.0))
    fit(module, make_data(), 1)
    assert module.work.passes == 1 and float(module.losses[1]) == 0
    with pytest.raises(ValueError, match="weight 0"):
        fit(make_module(TwoParts, weights=(0.0, 0.0)), make_data(), 1)


def test_skipped_parameters_neither_move_nor_count_in_clipping():
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    names = {name for name, _ in make_module(TwoParts).named_parameters() if ".h.0." in name}
    module = make_module(TwoParts, skip=names, max_grad_norm=1e-3, optimizer=adamw)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(module, make_data(), 2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert names and moved == set(before) - names
    assert len(trainer.optimizers[0].state) == len(before) - len(names)
    gradients = [p.grad for p in module.parameters()]
    assert all(g is None for g in gradients)


def test_notes_are_means_over_the_micro_batches_of_a_step():
    module = make_module(TwoParts, micro_batch_size=3)
    trainer = fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    assert float(trainer.callback_metrics["rows"]) == pytest.approx(
        float(batch["harmful"]["ids"].double().mean())
    )


def test_the_position_is_a_copy_of_the_weights():
    module = make_module(SFTModule)
    fit(module, make_data(), 1)
    position = module.weights.position()
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, make_data(), 2)
    assert all(torch.equal(a, b) for a, b in zip(position, before, strict=True))


def test_the_fused_loss_trains_as_the_plain_one():
    plain = make_module(SFTModule)
    fused = make_module(SFTModule, fused_loss=True)
    for module in (plain, fused):
        fit(module, make_data(), 3)
    for left, right in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay_all", [True, False])
def test_norms_and_biases_decay_on_demand_alone(decay_all):
    """Three steps against AdamW written out, with the decay of every weight chosen by hand."""
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=3.0)
    module = make_module(
        SFTModule, max_grad_norm=None, optimizer=adamw, decay_norm_and_bias=decay_all
    )
    network = copy.deepcopy(module.network)
    names = [name for name, _ in network.named_parameters()]
    # GPT-2's layer norms are ln_1, ln_2 and ln_f.
    spared = [name for name in names if ".ln_" in name or name.endswith("bias")]
    assert 0 < len(spared) < len(names)
    fit(module, make_data(), 3)
    moments = {name: [0.0, 0.0] for name in names}
    for step, batch in enumerate(global_batches(make_data(), 3), start=1):
        gradients = plain_gradient(network, batch["alignment"])
        for (name, weight), g in zip(network.named_parameters(), gradients, strict=True):
            m, v = moments[name]
            m, v = moments[name] = [0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g]
            change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            decay = 3.0 if decay_all or name not in spared else 0.0
            with torch.no_grad():
                weight -= 0.01 * (change + decay * weight)
    assert relative_error(list(module.parameters()), list(network.parameters())) < 1e-10


def test_a_run_with_two_groups_resumes_bit_for_bit(tmp_path):
    def made():
        return make_module(
            SFTModule,
            double=False,
            optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=3.0),
            decay_norm_and_bias=False,
        )

    whole, first, second = made(), made(), made()
    trainer = fit(whole, make_data(), 4)
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [9, 3]
    fit(first, make_data(), 2).save_checkpoint(tmp_path / "run.ckpt")
    fit(second, make_data(), 4, ckpt_path=tmp_path / "run.ckpt")
    assert same_bits(weights(second), weights(whole))


def test_adapters_alone_are_one_group():
    module = make_module(SFTModule, double=False, lora=True, decay_norm_and_bias=False)
    (group,) = module.parameter_groups()
    assert len(group["params"]) == len(trainable(module)) and "weight_decay" not in group


def test_an_optimizer_without_decay_is_refused():
    module = make_module(
        SFTModule, optimizer=partial(torch.optim.Rprop, lr=0.1), decay_norm_and_bias=False
    )
    with pytest.raises(TemperError, match="decay_norm_and_bias=false: Rprop has no weight decay"):
        fit(module, make_data(), 1)
