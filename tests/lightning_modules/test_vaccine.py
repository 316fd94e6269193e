"""Vaccine against a separate float64 computation, and its laws."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from lightning_modules import (
    BoosterModule,
    BoosterVaccineModule,
    RepNoiseModule,
    SFTModule,
    TARModule,
    TVaccineModule,
)
from lightning_modules.perturbation import added, output_gradients, perturbed_gradient
from lightning_modules.vaccine import VaccineModule
from temper.data.rows import FILL, PADDED, widen
from temper.errors import TemperError
from tests.errors import error_line
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    plain_mean_nll,
    relative_error,
    same_bits,
    trainable,
    weights,
)


class Plain(torch.nn.Module):
    """Stands where an attention block stood: keeps its outputs, one row at a time, and adds what it
    is told to.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.outputs = []
        self.add = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, *rest = self.inner(*args, **kwargs)
        if self.add is not None:
            out = out + self.add[len(self.outputs)]
        if out.requires_grad:
            out.retain_grad()
        self.outputs.append(out)
        return (out, *rest)


def plain_vaccine(
    network: Any, rows: Any, rho: float, layers: tuple[int, ...] = (0, 1)
) -> tuple[list[torch.Tensor], float, float]:
    """Gradient over the trainable weights, loss and perturbed loss: GPT-2, row by row, without
    padding; network is used up.
    """
    parameters = trainable(network)
    blocks = []
    for number, layer in enumerate(network.transformer.h):
        layer.attn = Plain(layer.attn)
        blocks += [layer.attn] if number in layers else []
    loss = plain_mean_nll(network, rows)
    loss.backward()  # of the mean: e has the same direction and length as with the sum
    gradients = [[out.grad for out in block.outputs] for block in blocks]
    norm = torch.sqrt(sum((g**2).sum() for row in gradients for g in row))
    for block, row in zip(blocks, gradients, strict=True):
        block.outputs = []
        block.add = [rho * g / norm for g in row]
    perturbed = plain_mean_nll(network, rows)
    return (
        list(torch.autograd.grad(perturbed, parameters)),
        float(loss.detach()),
        float(perturbed.detach()),
    )


def test_one_step_follows_the_equation():
    module = make_module(
        VaccineModule, rho=0.7, max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=1.0)
    )
    network = copy.deepcopy(module.network)
    start = weights(module)
    trainer = fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    gradient, loss, perturbed = plain_vaccine(network, batch["alignment"], 0.7)
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert relative_error(step, gradient) < 1e-10
    metrics = trainer.callback_metrics
    assert float(metrics["loss/alignment"]) == pytest.approx(loss, rel=1e-6)
    assert float(metrics["vaccine/perturbed_loss"]) == pytest.approx(perturbed, rel=1e-6)
    assert perturbed > loss + 1e-2  # the perturbation is not lost in rounding, and it hurts


def test_three_clipped_adamw_steps_follow_the_equation():
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    module = make_module(VaccineModule, rho=0.5, max_grad_norm=0.5, optimizer=adamw)
    network = copy.deepcopy(module.network)
    optimizer = adamw(trainable(network))
    fit(module, make_data(), 3)
    for batch in global_batches(make_data(), 3):
        for parameter, gradient in zip(
            trainable(network),
            plain_vaccine(copy.deepcopy(network), batch["alignment"], 0.5)[0],
            strict=True,
        ):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(trainable(network), 0.5)
        optimizer.step()
    assert relative_error(weights(module), weights(network)) < 1e-10


@pytest.mark.parametrize("double", [True, False])
def test_without_rho_it_is_sft_bit_for_bit(double: bool):
    adamw = partial(torch.optim.AdamW, lr=0.01)
    vaccine = make_module(VaccineModule, double=double, rho=0.0, optimizer=adamw)
    sft = make_module(SFTModule, double=double, optimizer=adamw)
    fit(vaccine, make_data(), 4)
    fit(sft, make_data(), 4)
    assert same_bits(weights(vaccine), weights(sft))


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(size: int):
    whole = make_module(VaccineModule, rho=0.7)
    split = make_module(VaccineModule, rho=0.7, micro_batch_size=size)
    fit(whole, make_data(), 3)
    fit(split, make_data(), 3)
    assert relative_error(weights(split), weights(whole)) < 1e-12
    assert split.work.passes == whole.work.passes == 2 * 3


def attached(**settings: Any) -> tuple[Any, Any]:
    """A module with a Trainer, so that its pieces can be called, and a batch."""
    module = make_module(VaccineModule, **settings)
    fit(module, make_data(), 0)
    return module, global_batches(make_data(), 1)[0]["alignment"]


def seen_perturbation(module: Any, rows: Any, rho: float) -> list[torch.Tensor]:
    """What is really added to the outputs of the attention blocks: with it minus without it."""
    plain = []
    moved = []
    honest = module.nll_terms
    module.nll_terms = lambda part: recorded(part)

    def recorded(part: Any) -> Any:
        """The outputs before and after our hook, which is already in place in the second pass."""
        outputs: list[torch.Tensor] = []
        hooks = [
            b.register_forward_hook(lambda _m, _i, out: outputs.append(out[0].detach().clone()))
            for b in module.attention
        ]
        first = [
            b.register_forward_hook(
                lambda _m, _i, out: outputs.append(out[0].detach().clone()), prepend=True
            )
            for b in module.attention
        ]
        terms = honest(part)
        for hook in (*hooks, *first):
            hook.remove()
        plain.extend(outputs[0::2])
        moved.extend(outputs[1::2])
        return terms

    perturbed_gradient(module, module.attention, rows, rho)
    module.nll_terms = honest
    return [after - before for before, after in zip(plain, moved, strict=True)]


@pytest.mark.parametrize("size", [None, 2])
def test_the_perturbation_has_length_rho_along_the_gradient(size: int | None):
    module, rows = attached(micro_batch_size=size)
    added_there = seen_perturbation(module, rows, 0.7)
    first = added_there[: len(added_there) // 2]
    second = added_there[len(added_there) // 2 :]
    assert all((tensor == 0).all() for tensor in first)
    assert float(torch.sqrt(sum((e**2).sum() for e in second))) == pytest.approx(0.7, rel=1e-12)
    gradients = [
        g for part in output_gradients(module, module.attention, rows).gradients for g in part
    ]
    assert sum(
        float((e * g).sum()) for e, g in zip(second, gradients, strict=True)
    ) == pytest.approx(0.7 * float(torch.sqrt(sum((g**2).sum() for g in gradients))), rel=1e-12)


def padded(rows: Any, more: int) -> Any:
    width = rows["input_ids"].shape[-1] + more
    return {
        name: widen(value, width, FILL.get(name, 0)) if name in PADDED else value
        for name, value in rows.items()
    }


def test_padding_changes_nothing_and_is_not_perturbed():
    module, rows = attached()
    exact, wide = (
        perturbed_gradient(module, module.attention, batch, 0.7)
        for batch in (rows, padded(rows, 3))
    )
    assert relative_error(list(wide.gradient), list(exact.gradient)) < 1e-12
    assert float(wide.norm) == pytest.approx(float(exact.norm), rel=1e-12)
    (gradients,) = output_gradients(module, module.attention, padded(rows, 3)).gradients
    outside = padded(rows, 3)["attention_mask"] == 0
    assert outside.any()
    assert all((g[outside] == 0).all() for g in gradients)


def test_output_gradients_need_no_trainable_weights():
    module, rows = attached()
    everything = output_gradients(module, module.attention, rows)
    for name, parameter in module.network.named_parameters():
        parameter.requires_grad_(name.startswith("transformer.ln_f"))  # above all blocks
    module._weights = None
    learning = []
    honest = module.nll_terms
    module.nll_terms = lambda part: (
        learning.append(any(p.requires_grad for p in module.network.parameters())) or honest(part)
    )
    late = output_gradients(module, module.attention, rows)
    assert learning == [False], "no activations are kept for weights"
    assert same_bits(list(late.norms_L), list(everything.norms_L))
    assert (everything.norms_L > 0).all()
    assert all(p.grad is None for p in module.network.parameters())


def hooks_left(module: Any) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in module.network.modules()
    )


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_hooks_and_frozen_weights_are_restored_on_error(bad_pass: int):
    module, rows = attached()
    honest = module.nll_terms
    calls = []
    before = hooks_left(module)

    def terms(part: Any) -> Any:
        calls.append(hooks_left(module))
        if len(calls) == bad_pass:
            raise RuntimeError("out of memory")
        return honest(part)

    module.nll_terms = terms
    with pytest.raises(RuntimeError, match="out of memory"):
        perturbed_gradient(module, module.attention, rows, 0.7)
    assert calls == [before + 2] * bad_pass
    assert hooks_left(module) == before
    assert all(p.requires_grad for p in module.network.parameters())
    module.nll_terms = honest
    perturbed_gradient(module, module.attention, rows, 0.7)
    assert hooks_left(module) == before


def test_blocks_may_return_tensors_or_tuples():
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "rest"

    one = torch.nn.Identity()
    two = Two()
    x = torch.zeros(2)
    with added([one, two], lambda block, output: torch.full_like(output, block + 1.0)):
        assert torch.equal(one(x), torch.ones(2))
        assert torch.equal(two(x)[0], 2 * torch.ones(2))
        assert two(x)[1] == "rest"
    assert torch.equal(one(x), x)


def test_checkpointed_activations_change_nothing():
    results = []
    for checkpointing in (False, True):
        module, rows = attached()
        if checkpointing:
            module.network.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        results.append(perturbed_gradient(module, module.attention, rows, 0.7))
    assert relative_error(list(results[1].gradient), list(results[0].gradient)) < 1e-12
    assert torch.equal(results[0].perturbed_loss, results[1].perturbed_loss)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (VaccineModule, {}),
        (TVaccineModule, {"n_layers": 1}),
        (BoosterVaccineModule, {}),
        (RepNoiseModule, {"noise_at": "mlp"}),
    ],
)
def test_reentrant_checkpointing_is_refused_in_one_line(kind, settings):
    data = make_data()
    module = make_module(kind, data, double=False, **settings)
    module.network.gradient_checkpointing_enable({"use_reentrant": True})
    start = weights(module)
    line = error_line(lambda: fit(module, data, 1))
    assert line == (
        "model.init_args.network: the network checkpoints its activations in the re-entrant way,"
        " which runs blocks without gradient, and this objective needs that of their outputs;"
        " switch it off there, or set model.init_args.network.activation_checkpointing=true, which"
        " is not re-entrant"
    )
    assert same_bits(weights(module), start)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SFTModule, {}),
        (BoosterModule, {"lam": 2.0}),
        (TARModule, {"inner_steps": 2, "tamper_every": 1}),
        (RepNoiseModule, {}),
    ],
)
def test_objectives_without_block_outputs_take_any_checkpointing(kind, settings):
    found = []
    for reentrant in (None, True):
        data = make_data(n_heldout=8, heldout_batch_size=4)
        module = make_module(
            kind, data, double=False, optimizer=partial(torch.optim.SGD, lr=0.1), **settings
        )
        if reentrant:
            module.network.gradient_checkpointing_enable({"use_reentrant": True})
        start = weights(module)
        fit(module, data, 1)
        found.append(weights(module))
    assert relative_error(found[1], found[0], start) < 1e-3


def test_a_loss_without_any_gradient_perturbs_nothing():
    module, rows = attached()
    honest = module.nll_terms
    plain = module.gradient(rows)[1]
    passes: list[None] = []

    def flat(part: Any) -> Any:
        passes.append(None)
        total, count = honest(part)
        return type(honest(part))(total * 0 if len(passes) == 1 else total, count)

    module.nll_terms = flat
    found = perturbed_gradient(module, module.attention, rows, 5.0)
    assert float(found.norm) == 0
    assert relative_error(list(found.gradient), list(plain)) < 1e-12


def test_a_first_pass_that_is_not_finite_skips_the_step():
    module = make_module(VaccineModule, optimizer=partial(torch.optim.AdamW, lr=0.01))
    start = weights(module)
    honest = module.nll_terms
    passes = []

    def overflow(part: Any) -> Any:
        passes.append(None)
        total, count = honest(part)
        return type(honest(part))(total * float("inf") if len(passes) % 2 else total, count)

    module.nll_terms = overflow
    fit(module, make_data(), -1, max_epochs=1, limit_train_batches=2)
    assert module.skipped_steps == 2
    assert same_bits(weights(module), start)


@pytest.mark.parametrize("fused", [False, True])
def test_lora_trains_adapters_alone(fused: bool):
    optimizer = partial(torch.optim.AdamW, lr=0.05)
    module = make_module(
        VaccineModule, rho=0.7, lora=True, double=False, fused_loss=fused, optimizer=optimizer
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, make_data(), 2)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_bf16_network_is_perturbed_in_bf16():
    module, rows = attached(double=False)
    module.network.to(torch.bfloat16)
    found = perturbed_gradient(module, module.attention, rows, 0.7)
    assert (found.norm.dtype, found.loss.dtype) == (torch.float32, torch.float32)
    assert float(found.perturbed_loss) > float(found.loss)


def test_ranks_share_one_norm():
    whole, rows = attached()
    alone = output_gradients(whole, whole.attention, rows)
    halves = [
        {name: value[part] for name, value in rows.items()}
        for part in (slice(0, 2), slice(2, None))
    ]
    parts = [output_gradients(whole, whole.attention, half) for half in halves]
    exchanged: list[torch.Tensor] = []
    for half in halves:  # what each rank hands in
        whole.weights.global_sum = lambda values: exchanged.append(values.clone()) or values
        output_gradients(whole, whole.attention, half)
    whole.weights.global_sum = lambda values: sum(exchanged)
    together = output_gradients(whole, whole.attention, halves[0])
    assert float(together.norm) == pytest.approx(float(alone.norm), rel=1e-12)
    assert float(together.loss) == pytest.approx(float(alone.loss), rel=1e-12)
    assert float(parts[0].norm) < float(alone.norm)


def test_a_negative_rho_is_refused():
    with pytest.raises(TemperError, match=r"model\.init_args\.rho=-1\.0: give a number >= 0"):
        make_module(VaccineModule, rho=-1.0)
