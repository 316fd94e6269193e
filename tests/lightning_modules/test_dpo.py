"""Preference optimisation against a separate float64 computation; references, resuming, and
refusals.
"""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from lightning_modules.dpo import DPOModule
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX
from temper.losses.preference import PREFERENCE
from temper.models import LoRASpec, NetworkSpec
from tests.objectives import SHAPE, make_module, relative_error, same_bits, trainable, weights
from tests.preference import batches, exact, exact_lora, make_pairs, plain_logps, run

SETTINGS = {
    "cdpo": {"label_smoothing": 0.2},
    "robust": {"label_smoothing": 0.2},
    "simpo": {"beta": 2.0, "gamma": 0.7},
}
STEP = partial(torch.optim.SGD, lr=1.0)


def plain_loss(
    network,
    reference,
    rows,
    variant="sigmoid",
    beta=0.1,
    beta_chosen=None,
    beta_rejected=None,
    label_smoothing=0.0,
    gamma=0.0,
    window=1.0,
    chosen_nll=0.0,
):
    """Mean over pairs, written out pair by pair."""
    policy = [plain_logps(network, rows, which) for which in (0, 1)]
    with torch.no_grad():
        frozen = [plain_logps(reference, rows, which)[0] for which in (0, 1)]
    losses = []
    for i in range(len(rows["ids"])):
        logps = [sums[i] for sums, _ in policy]
        counts = [counts[i] for _, counts in policy]
        ratios = [
            (logp - reference[i]) / window for logp, reference in zip(logps, frozen, strict=True)
        ]
        if beta_chosen or beta_rejected:
            loss = -logsigmoid(
                (beta_chosen or beta) * ratios[0] - (beta_rejected or beta) * ratios[1]
            )
        else:
            loss = _pair_loss(variant, ratios, logps, counts, beta, label_smoothing, gamma)
        losses.append(loss - chosen_nll * logps[0] / counts[0])
    return sum(losses) / len(losses)


def _pair_loss(variant, ratios, logps, counts, b, e, gamma):
    d = b * (ratios[0] - ratios[1])
    per_token = ratios[0] / counts[0] - ratios[1] / counts[1]
    means = logps[0] / counts[0], logps[1] / counts[1]
    odds = [m.exp() / (1 - m.exp()) for m in means]
    return {
        "sigmoid": lambda: -logsigmoid(d),
        "cdpo": lambda: -(1 - e) * logsigmoid(d) - e * logsigmoid(-d),
        "robust": lambda: (-(1 - e) * logsigmoid(d) + e * logsigmoid(-d)) / (1 - 2 * e),
        "hinge": lambda: torch.relu(1 - d),
        "ipo": lambda: (per_token - 1 / (2 * b)) ** 2,
        "sigmoid_norm": lambda: -logsigmoid(b * per_token),
        "simpo": lambda: -logsigmoid(b * (means[0] - means[1]) - gamma),
        "orpo": lambda: -means[0] - b * logsigmoid(torch.log(odds[0] / odds[1])),
    }[variant]()


def plain_run(network, steps: int, lr: float, **settings: Any) -> list[float]:
    """Gradient descent on `plain_loss` in place; the losses."""
    reference = copy.deepcopy(network)
    losses = []
    for rows in batches(make_pairs(), steps):
        loss = plain_loss(network, reference, rows, **settings)
        with torch.no_grad():
            for parameter, gradient in zip(
                trainable(network), torch.autograd.grad(loss, trainable(network)), strict=True
            ):
                parameter -= lr * gradient
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("variant", PREFERENCE)
def test_three_steps_of_every_variant_follow_the_equations(variant):
    settings = SETTINGS.get(variant, {})
    # IPO's gradient is that of a square: large steps would leave the region where anything is
    # smooth.
    lr = 1e-3 if variant == "ipo" else 0.3
    module = exact(
        DPOModule,
        variant=variant,
        max_grad_norm=None,
        optimizer=partial(torch.optim.SGD, lr=lr),
        **settings,
    )
    network = copy.deepcopy(module.network)
    start = weights(module)
    trainer = run(module, make_pairs(), 3)
    losses = plain_run(network, 3, lr, variant=variant, **settings)
    assert relative_error(weights(module), weights(network), start) < 1e-10
    assert float(trainer.callback_metrics["loss/preference"]) == pytest.approx(
        losses[-1], rel=1e-10
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_chosen": 0.1, "beta_rejected": 0.01},
        {"beta_rejected": 0.01},
        {"beta_chosen": 1.0},
        {"window": 4.0},
        {"beta_chosen": 1.0, "beta_rejected": 0.3, "window": 7.0, "chosen_nll": 0.3},
    ],
)
def test_two_betas_window_and_chosen_nll_follow_equations(changes):
    module = exact(
        DPOModule, max_grad_norm=None, optimizer=partial(torch.optim.SGD, lr=0.3), **changes
    )
    network = copy.deepcopy(module.network)
    start = weights(module)
    run(module, make_pairs(), 2)
    plain_run(network, 2, 0.3, **changes)
    assert relative_error(weights(module), weights(network), start) < 1e-10


def test_the_mechanistic_gradient_is_that_of_the_released_loss():
    """The config's own settings, against ``-log sigma((0.1 c - 0.01 r) / window)`` in every pair,
    whatever its prompt.
    """
    config = yaml.safe_load(Path("configs/objective/dpo_mechanistic.yaml").read_text())
    given = config["model"]["init_args"]
    given = {name: given[name] for name in ("variant", "beta_chosen", "beta_rejected", "window")}
    module = exact(DPOModule, max_grad_norm=None, optimizer=STEP, **given)
    run(module, make_pairs(), 1)  # the reference is the policy before this step
    rows = batches(make_pairs(), 2)[1]
    assert set(rows["unsafe"].tolist()) == {True, False}
    found = module.gradient(rows, module.preference_terms)[1]
    policy = module.network
    reference = module._reference.network
    losses = []
    for i in range(len(rows["ids"])):
        ratios = [
            plain_logps(policy, rows, k)[0][i] - plain_logps(reference, rows, k)[0][i].detach()
            for k in (0, 1)
        ]
        losses.append(torch.log1p(torch.exp(-(0.1 * ratios[0] - 0.01 * ratios[1]) / 25)))
    plain = torch.autograd.grad(sum(losses) / len(losses), trainable(policy))
    assert relative_error(list(found), list(plain)) < 1e-10


def dropping(module: Any, p: float = 0.5) -> Any:
    """The same module with dropout in its network."""
    for part in module.network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = p
    return module


@pytest.mark.parametrize("source", ["adapter_off", "frozen"])
def test_the_first_loss_is_log_2_also_with_dropout(source):
    module = dropping(exact_lora(DPOModule, reference=source))
    trainer = run(module, make_pairs(), 1)
    assert float(trainer.callback_metrics["loss/preference"]) == pytest.approx(
        math.log(2), rel=1e-15
    )  # a mean of six
    assert trainer.callback_metrics["preference/margin"] == 0


def test_dropout_is_off_in_attention_that_keeps_it_as_a_number():
    module = make_module(DPOModule, data=make_pairs(), double=False)
    for part in module.network.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    assert run(module, make_pairs(), 1).callback_metrics["loss/preference"] == torch.tensor(
        math.log(2)
    )


def test_adapter_cache_and_copy_references_give_same_steps(tmp_path):
    settings = {"optimizer": STEP, "max_grad_norm": None, "reference_cache": str(tmp_path)}
    modules = {
        source: exact_lora(DPOModule, reference=source, **settings)
        for source in ("frozen", "adapter_off", "cached")
    }
    start = weights(modules["frozen"])
    losses = {
        source: float(run(module, make_pairs(), 4).callback_metrics["loss/preference"])
        for source, module in modules.items()
    }
    assert (
        relative_error(weights(modules["adapter_off"]), weights(modules["frozen"]), start) < 1e-13
    )
    assert relative_error(weights(modules["cached"]), weights(modules["frozen"]), start) < 1e-11
    assert (
        losses["frozen"] == pytest.approx(losses["adapter_off"]) == pytest.approx(losses["cached"])
    )
    assert losses["frozen"] != pytest.approx(math.log(2), rel=1e-3)


def test_reference_passes_are_counted_and_a_cache_needs_none(tmp_path):
    frozen, cached = (
        exact(DPOModule, reference=source, reference_cache=str(tmp_path))
        for source in ("frozen", "cached")
    )
    run(frozen, make_pairs(), 2)
    run(cached, make_pairs(), 2)
    assert (frozen.work.passes, frozen.work.forwards) == (2, 2)
    assert (cached.work.passes, cached.work.forwards) == (2, 0)
    assert int(frozen.work.tokens) == int(frozen.work.forward_tokens) == int(cached.work.tokens)


@pytest.mark.parametrize("variant", ["simpo", "orpo"])
def test_variants_without_a_reference_build_none(variant):
    module = exact(DPOModule, variant=variant)
    run(module, make_pairs(), 1)
    assert module._reference is None
    assert module.work.forwards == 0


@pytest.mark.parametrize(
    ("source", "lora"),
    [("frozen", False), ("cached", False), ("adapter_off", True), ("cached", True)],
)
def test_a_resumed_run_has_the_same_reference(source, lora, tmp_path):
    def make():
        torch.manual_seed(0)
        settings = {
            "reference": source,
            "reference_cache": str(tmp_path / "cache"),
            "optimizer": partial(torch.optim.AdamW, lr=0.01),
        }
        return make_module(
            DPOModule, data=make_pairs(), double=False, lora=lora, beta=1.0, **settings
        )

    whole = make()
    first = make()
    second = make()
    fresh = make()
    run(whole, make_pairs(), 4)
    run(first, make_pairs(), 2).save_checkpoint(tmp_path / "run.ckpt")
    assert run(second, make_pairs(), 4, tmp_path / "run.ckpt").global_step == 4
    assert same_bits(weights(second), weights(whole))
    assert second.work.passes == 4
    # It matters: with the checkpoint's weights as reference the run ends elsewhere.
    fresh.network.load_state_dict(first.network.state_dict())
    if not lora:
        run(fresh, make_pairs(), 4, tmp_path / "run.ckpt")
        assert not same_bits(weights(fresh), weights(whole))


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("variant", ["sigmoid", "orpo"])
def test_micro_batches_of_unequal_length_equal_the_whole_batch(size, variant):
    betas = {"beta_rejected": 0.3} if variant == "sigmoid" else {}
    whole, split = (
        exact(DPOModule, variant=variant, micro_batch_size=n, **betas) for n in (None, size)
    )
    start = weights(whole)
    run(whole, make_pairs(), 3)
    run(split, make_pairs(), 3)
    assert relative_error(weights(split), weights(whole), start) < 1e-12


@given(right=st.integers(1, 6), left=st.integers(1, 4))
@examples(max_examples=6)
def test_padding_does_not_change_the_loss(networks, right, left):
    exactly, llama, rows = networks
    widths = {"labels": IGNORE_INDEX, "attention_mask": 0, "input_ids": 1}
    padded = lambda *sides: (
        rows
        | {
            name: torch.nn.functional.pad(rows[name], sides, value=value)
            for name, value in widths.items()
        }
    )  # noqa: E731
    loss = lambda module, rows: module.preference_terms(rows).total.item()  # noqa: E731
    assert loss(exactly, padded(0, right)) == pytest.approx(loss(exactly, rows), rel=1e-13)
    # Llama's positions are relative, and its norms in float32.
    assert loss(llama, padded(left, 0)) == pytest.approx(loss(llama, rows), rel=1e-5)


@pytest.fixture(scope="module")
def networks() -> tuple[Any, Any, Any]:
    """A float64 GPT-2, a float32 Llama, and rows."""
    make = lambda double: make_module(DPOModule, data=make_pairs(), double=double, variant="orpo")  # noqa: E731
    return make(True), make(False), batches(make_pairs(), 1)[0]


def test_a_pairs_longer_prompt_is_scored_by_its_answer():
    """Labels decide what counts: with labels on the prompt too the loss is another."""
    (rows,) = batches(make_pairs(), 1)
    module = exact(DPOModule, variant="simpo", beta=2.0)
    everywhere = rows | {
        "labels": torch.where(rows["attention_mask"].bool(), rows["input_ids"], -100)
    }
    assert module.preference_terms(everywhere).total.item() != pytest.approx(
        module.preference_terms(rows).total.item(), rel=1e-3
    )


def test_lora_trains_adapters_alone():
    module = make_module(
        DPOModule,
        data=make_pairs(),
        double=False,
        lora=True,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run(module, make_pairs(), 2)
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == {
        n for n in before if "lora_" in n
    }


def test_rewards_are_what_the_loss_sees_times_beta():
    betas = {"beta_chosen": 0.5, "beta_rejected": 2.0}
    module = exact(DPOModule, **betas, micro_batch_size=4, max_grad_norm=None, optimizer=STEP)
    network = copy.deepcopy(module.network)
    trainer = run(module, make_pairs(), 2)
    reference = copy.deepcopy(network)
    plain_run(network, 1, 1.0, **betas)
    rows = batches(make_pairs(), 2)[1]
    with torch.no_grad():
        c, r = (
            [
                a - b
                for a, b in zip(
                    plain_logps(network, rows, i)[0],
                    plain_logps(reference, rows, i)[0],
                    strict=True,
                )
            ]
            for i in (0, 1)
        )
    chosen = 0.5 * torch.stack(c)
    rejected = 2.0 * torch.stack(r)
    found = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith("preference/")
    }
    wanted = {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).double(),
    }
    assert found == pytest.approx(
        {f"preference/{name}": float(value.mean()) for name, value in wanted.items()}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "sigmiod"}, "variant=sigmiod: no such loss; did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta=0.0: give a number > 0"),
        ({"beta": math.nan}, "beta=nan: give a number > 0"),
        ({"beta_chosen": -1.0}, "beta_chosen=-1.0: give a number > 0"),
        ({"beta_rejected": 0.0}, "beta_rejected=0.0: give a number > 0"),
        (
            {"beta_rejected": 0.01, "variant": "ipo"},
            "beta_rejected=0.01: variant=ipo does not read it; set it to null, or use sigmoid",
        ),
        ({"beta_chosen": 0.1, "variant": "cdpo"}, "beta_chosen=0.1: variant=cdpo does not read"),
        ({"window": 0.0}, "window=0.0"),
        ({"chosen_nll": -1.0}, "chosen_nll=-1.0"),
        (
            {"label_smoothing": 0.1},
            "label_smoothing=0.1: variant=sigmoid does not read it.*cdpo or robust",
        ),
        (
            {"label_smoothing": 0.5, "variant": "robust"},
            r"label_smoothing=0.5: give a share in \[0, 0.5\)",
        ),
        ({"label_smoothing": -0.1, "variant": "cdpo"}, "label_smoothing=-0.1"),
        (
            {"gamma": 0.5, "variant": "orpo"},
            "gamma=0.5: variant=orpo does not read it; set it to 0, or use simpo",
        ),
        ({"gamma": -0.5, "variant": "simpo"}, "gamma=-0.5"),
        (
            {"window": 8.0, "variant": "simpo"},
            "window=8.0: variant=simpo divides by each answer's own length already",
        ),
        ({"window": 8.0, "variant": "ipo"}, "window=8.0: variant=ipo divides"),
        ({"reference": "adapter_off"}, "reference=adapter_off: there is no new adapter"),
    ],
)
def test_ignored_or_invalid_settings_are_refused(changes, message):
    with pytest.raises(TemperError, match=message):
        DPOModule(NetworkSpec(shape=SHAPE), **changes)


def test_dropout_in_the_adapter_is_refused():
    with pytest.raises(TemperError, match=r"network.lora.dropout=0.1: preference losses"):
        DPOModule(NetworkSpec(shape=SHAPE, lora=LoRASpec(dropout=0.1)))


def test_an_unknown_variant_is_one_line_of_error(command_line, capsys):
    with pytest.raises(SystemExit) as left:
        command_line(
            "fit",
            "--model=lightning_modules.dpo.DPOModule",
            "--model.init_args.variant=sigmiod",
            "--data=SyntheticAlignment",
        )
    assert left.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "sigmiod" in line
    assert "sigmoid_norm" in line
    assert "\n" not in line
