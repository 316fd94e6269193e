"""T-Vaccine: which layers are drawn, that the others stand still, and that all of them make
Vaccine.
"""

import copy
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_modules.t_vaccine import TVaccineModule
from lightning_modules.vaccine import VaccineModule
from temper.errors import TemperError
from tests.lightning_modules.test_vaccine import plain_vaccine
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    plain_mean_nll,
    relative_error,
    same_bits,
    weights,
)

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def make(n_layers: int = 1, **settings: Any) -> Any:
    return make_module(
        TVaccineModule,
        **{"rho": 0.7, "n_layers": n_layers, "importance_every": 4, "sample_every": 2} | settings,
    )


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that a GPT-2 parameter is in."""
    return int(name.split(".h.")[1].split(".")[0]) if ".h." in name else None


def watch(module: Any) -> list[tuple[int, list[int], list[float] | None]]:
    """(step, chosen layers, importances) after every step."""
    seen = []
    honest = module.training_step

    def step(batch: Any, batch_idx: int) -> None:
        number = module.global_step
        honest(batch, batch_idx)
        seen.append(
            (
                number,
                list(module.chosen),
                None if module.importance_L is None else module.importance_L.tolist(),
            )
        )

    module.training_step = step
    return seen


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("micro", [None, 4])
def test_with_all_layers_it_is_vaccine_bit_for_bit(double: bool, micro: int | None):
    n_layers = 2 if double else 1
    settings = {"double": double, "optimizer": ADAMW, "micro_batch_size": micro}
    targeted = make(n_layers, **settings)
    vaccine = make_module(VaccineModule, rho=0.7, **settings)
    fit(targeted, make_data(), 5)
    fit(vaccine, make_data(), 5)
    assert same_bits(weights(targeted), weights(vaccine))
    assert targeted.work.passes == vaccine.work.passes + 2  # importances at steps 0 and 4


def test_one_step_trains_the_chosen_layers_alone():
    module = make(max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=1.0))
    network = copy.deepcopy(module.network)
    start = weights(module)
    fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    (chosen,) = module.chosen
    gradient, *_ = plain_vaccine(network, batch["alignment"], 0.7, layers=(chosen,))
    names = [name for name, _ in module.named_parameters()]
    wanted = [
        g * 0 if layer_of(name) == 1 - chosen else g
        for name, g in zip(names, gradient, strict=True)
    ]
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert relative_error(step, wanted) < 1e-10
    assert any(bool(s.any()) for name, s in zip(names, step, strict=True) if layer_of(name) is None)


def test_importances_are_norms_of_the_harmful_gradient():
    module = make(optimizer=partial(torch.optim.SGD, lr=1.0), micro_batch_size=3)
    network = copy.deepcopy(module.network)
    fit(module, make_data(), 1)
    rows = global_batches(make_data(), 1)[0]["harmful"]
    outputs: list[list[torch.Tensor]] = [[], []]

    def keep(layer: int, out: torch.Tensor) -> None:
        out.retain_grad()
        outputs[layer].append(out)

    for number, layer in enumerate(network.transformer.h):
        layer.attn.register_forward_hook(lambda _m, _i, out, number=number: keep(number, out[0]))
    tokens = int((rows["labels"] != -100).sum())
    (plain_mean_nll(network, rows) * tokens).backward()
    wanted = [float(torch.sqrt(sum((out.grad**2).sum() for out in layer))) for layer in outputs]
    assert module.importance_L.tolist() == pytest.approx(wanted, rel=1e-10)


def test_other_layers_keep_weights_and_optimizer_state():
    module = make(sample_every=100, importance_every=100, optimizer=ADAMW)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = fit(module, make_data(), 3)
    (chosen,) = module.chosen
    state = trainer.optimizers[0].state
    for name, parameter in module.named_parameters():
        still = layer_of(name) == 1 - chosen
        assert torch.equal(parameter, before[name]) is still, name
        assert (parameter not in state) is still, name
        assert parameter.requires_grad


def test_a_layer_keeps_its_momentum_until_drawn_again():
    module = make(sample_every=1, importance_every=100, optimizer=ADAMW, seed=1)
    seen = watch(module)
    trainer = fit(module, make_data(), 6)
    turns = [sum(chosen == [layer] for _, chosen, _ in seen) for layer in (0, 1)]
    assert 0 < turns[0] < 6  # both were drawn
    steps = {
        name: int(trainer.optimizers[0].state[p]["step"]) for name, p in module.named_parameters()
    }
    assert all(
        count == (6 if layer_of(name) is None else turns[layer_of(name)])
        for name, count in steps.items()
    )


@pytest.mark.parametrize(("importance_every", "sample_every"), [(4, 2), (3, 2), (2, 4)])
def test_importances_and_layers_are_renewed_when_they_are_due(
    importance_every: int, sample_every: int
):
    module = make(importance_every=importance_every, sample_every=sample_every, optimizer=ADAMW)
    seen = watch(module)
    fit(module, make_data(), 9)
    assert [number for number, *_ in seen] == list(range(9))
    for (_, chosen, importance), (number, chosen_next, importance_next) in zip(
        seen, seen[1:], strict=False
    ):
        assert (importance != importance_next) is (number % importance_every == 0)
        assert number % sample_every == 0 or chosen == chosen_next
    assert module.work.passes == 2 * 9 + len(range(0, 9, importance_every))


def draws(module: Any, steps: int) -> torch.Tensor:
    """How often each layer is drawn at the given number of different steps."""
    counts = torch.zeros(len(module.layers))
    for step in range(steps):
        counts[module._draw(step)] += 1
    return counts / steps


def test_layers_are_drawn_by_importance():
    module = make()
    fit(module, make_data(), 0)
    module.layers = [None] * 3
    module.n_layers = 2
    module.importance_L = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    shares = draws(module, 2000)
    p = [0.6, 0.3, 0.1]
    wanted = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    assert shares.tolist() == pytest.approx(wanted, abs=0.04)
    assert float(shares.sum()) == pytest.approx(2)


def test_layers_without_gradient_are_drawn_last():
    module = make()
    fit(module, make_data(), 0)
    module.layers = [None] * 3
    module.n_layers = 2
    module.importance_L = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    assert draws(module, 50).tolist() == [1, 0, 1]
    module.importance_L = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert draws(module, 50)[0] == 1
    module.importance_L = torch.zeros(3, dtype=torch.float64)
    assert draws(module, 300).tolist() == pytest.approx([2 / 3] * 3, abs=0.1)


def test_draws_depend_on_the_seed_argument_and_the_step_alone():
    runs = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        module = make(sample_every=1, seed=seed, optimizer=ADAMW)
        torch.manual_seed(noise)
        seen = watch(module)
        fit(module, make_data(), 8)
        runs.append([chosen for _, chosen, _ in seen])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("steps_before", [1, 2, 3, 5])
def test_resuming_equals_never_having_stopped(steps_before: int, tmp_path: Any):
    settings = {"importance_every": 4, "sample_every": 3, "optimizer": ADAMW, "seed": 1}
    whole, first, second = (make(**settings) for _ in range(3))
    fit(whole, make_data(), 7)
    fit(first, make_data(), steps_before).save_checkpoint(tmp_path / "run.ckpt")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=7,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(second, datamodule=make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 7
    assert same_bits(weights(second), weights(whole))
    assert (second.chosen, second.importance_L.tolist()) == (
        whole.chosen,
        whole.importance_L.tolist(),
    )


def test_non_finite_importances_skip_the_step():
    module = make(optimizer=ADAMW)
    start = weights(module)
    honest = module.nll_terms
    passes = []

    def overflow(rows: Any) -> Any:
        total, count = honest(rows)
        if len(rows["ids"]) == 4:  # the harmful stream's batch size
            passes.append(None)
            total = total * (float("nan") if len(passes) == 1 else 1.0)
        return type(honest(rows))(total, count)

    module.nll_terms = overflow
    seen = watch(module)
    fit(module, make_data(), -1, max_epochs=1, limit_train_batches=2)
    assert module.skipped_steps == 1
    assert [number for number, *_ in seen] == [0, 0]
    assert [importance is None for *_, importance in seen] == [True, False]
    assert len(passes) == 2
    assert not same_bits(weights(module), start)


def test_lora_trains_the_adapters_of_the_chosen_layers_alone():
    module = make(lora=True, double=False, optimizer=partial(torch.optim.AdamW, lr=0.05))
    from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network

    shape = ShapeSpec(hidden_size=16, n_layers=3, n_heads=2, intermediate_size=32, seed=3)
    module.network = build_network(
        NetworkSpec(shape=shape, lora=LoRASpec(rank=2, alpha=4)), make_data().tokenizer
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, make_data(), 2)
    (chosen,) = module.chosen
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name and f".layers.{chosen}." in name}


@pytest.mark.parametrize("flag", ["n_layers", "importance_every", "sample_every"])
def test_numbers_below_one_are_refused_by_name(flag: str):
    with pytest.raises(TemperError, match=rf"model\.init_args\.{flag}=0: give a whole number >= 1"):
        make(**{flag: 0})


def test_more_layers_than_there_are_and_bad_seeds_are_refused():
    with pytest.raises(
        TemperError,
        match=r"model\.init_args\.n_layers=3: the network has 2 decoder layers; give at most that",
    ):
        fit(make(3), make_data(), 1)
    with pytest.raises(TemperError, match=r"model\.init_args\.seed=-1"):
        make(seed=-1)
    with pytest.raises(TemperError, match=r"model\.init_args\.rho=-1"):
        make(rho=-1)
