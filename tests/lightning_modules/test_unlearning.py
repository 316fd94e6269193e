"""Unlearning: every forget and retain loss against a separate float64 computation; resuming and
refusals.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml

from lightning_modules.unlearning import UnlearningModule
from temper.data.rows import FILL, PADDED, select, widen
from temper.errors import TemperError
from temper.losses.unlearning import FORGET, RETAIN
from tests.objectives import fit, make_module, relative_error, trainable
from tests.unlearning import (
    ALPHA,
    GAMMA,
    batches,
    check_step,
    logps,
    module_of,
    one_step,
    other_network,
    plain_forget,
    plain_retain,
    unlearning_data,
)

COMBINATIONS = [(forget, retain) for forget in FORGET for retain in RETAIN]


@pytest.mark.parametrize(("forget", "retain"), COMBINATIONS)
def test_loss_and_gradient_follow_the_equations(forget: str, retain: str):
    assert len({int(n) for n in batches()["forget"]["attention_mask"].sum(-1).flatten()}) > 2, (
        "lengths should differ"
    )
    check_step(forget, retain, (None, 5))


@pytest.mark.parametrize(
    ("forget", "retain"), [(f, "none") for f in FORGET] + [("ga", r) for r in RETAIN]
)
def test_micro_batches_do_not_change_the_losses(forget: str, retain: str):
    check_step(forget, retain, (1, 2, 4, 8))


@pytest.mark.parametrize(
    ("forget", "retain"),
    [("bounded", "nll"), ("npo", "kl"), ("idk_dpo", "embedding"), ("undial", "none")],
)
def test_three_steps_refer_to_the_model_before_training(forget: str, retain: str):
    data = {"batch_size": 3, "retain_batch_size": 4}
    module = module_of(
        forget,
        retain,
        gamma=GAMMA,
        alpha=ALPHA,
        max_grad_norm=None,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
    )
    network = copy.deepcopy(module.network)
    reference = copy.deepcopy(module.network)
    fit(module, unlearning_data(**data), 3)
    plain = unlearning_data(**data)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    plain.setup("fit")
    for step in range(3):
        f = plain_forget(forget, network, reference, plain.sources["forget"].batch(step))
        r = plain_retain(retain, network, reference, plain.sources["retain"].batch(step))
        optimizer.zero_grad()
        (GAMMA * f + ALPHA * r).backward()
        optimizer.step()
    assert relative_error(list(module.network.parameters()), list(network.parameters())) < 1e-10


def test_at_the_reference_npo_is_scaled_gradient_ascent():
    (_, npo), (_, ga) = (one_step(module_of(forget, "none"), batches()) for forget in ("npo", "ga"))
    tokens = int((batches()["forget"]["labels"][:, 0] != -100).sum()) / 8
    assert relative_error(npo, [tokens * g for g in ga]) < 1e-10


@pytest.mark.parametrize("retain", ["kl", "kl_all", "embedding"])
def test_at_the_reference_kl_and_embedding_are_zero(retain: str):
    with_retain, without = (
        one_step(module_of("ga", name, alpha=5.0), batches()) for name in (retain, "none")
    )
    assert with_retain[0][1] == pytest.approx(0, abs=1e-14)
    assert relative_error(with_retain[1], without[1]) < 1e-10


@pytest.mark.parametrize(
    ("forget", "retain"), [(f, "kl") for f in FORGET] + [("ga", r) for r in RETAIN]
)
def test_wider_padding_changes_nothing(forget: str, retain: str):
    wide = {
        stream: {
            k: widen(v, v.shape[-1] + 3, FILL.get(k, 0)) if k in PADDED else v
            for k, v in rows.items()
        }
        for stream, rows in batches().items()
    }
    results = []
    for batch in (batches(), wide):
        module = module_of(forget, retain)
        results.append(one_step(module, batch, other_network(module.network)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert relative_error(results[1][1], results[0][1]) < 1e-11


@pytest.mark.parametrize("forget", ["ga", "idk_nll", "idk_dpo"])
def test_a_sequence_that_the_loss_does_not_read_costs_no_pass(forget: str):
    module = module_of(forget, "nll")
    one_step(module, batches())
    read = {"ga": slice(0, 1), "idk_nll": slice(1, 2), "idk_dpo": slice(0, 2)}[forget]
    tokens = (
        batches()["forget"]["attention_mask"][:, read].sum()
        + batches()["retain"]["attention_mask"][:, 0].sum()
    )
    assert (module.work.passes, int(module.work.tokens)) == (2, int(tokens))


def test_only_losses_with_substitutes_need_pairs():
    single = {
        name: value[:, 0] if name in PADDED else value
        for name, value in batches()["forget"].items()
    }
    batch = batches() | {"forget": single}
    losses, _ = one_step(module_of("npo", "nll"), batch)
    assert losses == one_step(module_of("npo", "nll"), batches())[0]
    for forget in ("bounded", "idk_nll", "idk_dpo"):
        with pytest.raises(
            TemperError,
            match="reads a substitute answer, .*'forget' holds one sequence per row",
        ):
            one_step(module_of(forget, "nll"), batch)


def test_only_bounded_retaining_needs_pairs_to_retain():
    single = {
        name: value[:, 0] if name in PADDED else value
        for name, value in batches()["retain"].items()
    }
    batch = batches() | {"retain": single}
    for retain in ("nll", "kl", "kl_all", "embedding"):
        losses, _ = one_step(module_of("ga", retain), batch)
        assert losses == one_step(module_of("ga", retain), batches())[0], retain
    with pytest.raises(
        TemperError,
        match="model.init_args.retain: .*'retain' holds one sequence per row; set"
        " data.init_args.retain_substitutes=true .*column 'substitute'",
    ):
        one_step(module_of("ga", "bounded"), batch)


def test_the_mechanistic_config_ascends_on_both_kinds_of_prompts():
    """The config's step against the released loss: on each kind of batch the NLL of the preferred
    answer minus 0.1 times that of the other one.
    """
    config = yaml.safe_load(Path("configs/objective/unlearn_bounded.yaml").read_text())
    given = config["model"]["init_args"]
    given = {name: given[name] for name in ("forget", "retain", "gamma", "alpha", "ascent")}
    network = module_of("ga", "none").network
    kinds = []
    for stream, preferred in (("forget", 1), ("retain", 0)):
        rows = batches()[stream]
        nll = [
            [-logps(network, rows, i, k).mean() for k in (preferred, 1 - preferred)]
            for i in range(8)
        ]
        kinds.append(sum(good - 0.1 * bad for good, bad in nll) / 8)
    plain = torch.autograd.grad(0.5 * sum(kinds), trainable(network))
    losses, gradient = one_step(
        make_module(UnlearningModule, unlearning_data(), **given), batches()
    )
    assert losses == pytest.approx([float(kind.detach()) for kind in kinds], rel=1e-10)
    assert relative_error(gradient, list(plain)) < 1e-10


def test_without_retain_loss_or_guard_no_rows_are_needed():
    assert module_of("ga", "none").streams == ("forget",)
    assert module_of("ga", "nll", alpha=0.0).streams == ("forget",)
    assert module_of("ga", "none", collapse_factor=2.0).streams == ("forget", "retain")
    fit(module_of("ga", "none"), unlearning_data(), 1)


def test_a_cached_reference_gives_what_a_frozen_one_does(tmp_path: Any):
    results = []
    for source in ("frozen", "cached"):
        for forget in ("npo", "idk_dpo"):
            module = module_of(forget, "nll", reference=source, reference_cache=str(tmp_path))
            fit(module, unlearning_data(batch_size=4, retain_batch_size=4), 3)
            results.append([p.detach() for p in module.parameters()])
    assert relative_error(results[2], results[0]) < 1e-12
    assert relative_error(results[3], results[1]) < 1e-12


@pytest.mark.parametrize(
    ("forget", "retain"), [(f, "nll") for f in FORGET] + [("npo", r) for r in RETAIN]
)
def test_lora_uses_the_adapter_off_as_reference(forget: str, retain: str):
    settings = {
        "lora": True,
        "double": False,
        "micro_batch_size": 5,
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
    }
    off = module_of(forget, retain, **settings)
    assert off.reference_source == "adapter_off"
    before = {name: p.detach().clone() for name, p in off.named_parameters()}
    fit(off, unlearning_data(), 2)
    assert {n for n, p in off.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in before if "lora_" in n
    }
    if (forget, retain) in (("npo", "kl"), ("npo", "embedding"), ("undial", "nll")):
        frozen = module_of(forget, retain, reference="frozen", **settings)
        frozen.load_state_dict(before, strict=False)
        fit(frozen, unlearning_data(), 2)
        moved = [
            [p.detach() - before[n] for n, p in m.named_parameters() if "lora_" in n]
            for m in (off, frozen)
        ]
        assert relative_error(*moved) < 1e-3


# -- resume


@pytest.mark.parametrize(
    ("forget", "retain", "lora"),
    [
        ("npo", "kl", False),
        ("idk_dpo", "nll", True),
        ("undial", "embedding", False),
        ("undial", "kl", True),
        ("bounded", "bounded", False),
        ("ga", "none", False),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    forget: str, retain: str, lora: bool, tmp_path: Any
):
    settings = {
        "double": False,
        "lora": lora,
        "collapse_factor": 50.0,
        "optimizer": partial(torch.optim.AdamW, lr=0.01),
    }
    data = {"batch_size": 3, "retain_batch_size": 3}
    torch.manual_seed(0)  # LoRA's first weights
    whole, first, second = (module_of(forget, retain, **settings) for _ in range(3))
    first.load_state_dict(whole.state_dict())
    second.load_state_dict(whole.state_dict())
    fit(whole, unlearning_data(**data), 5)
    fit(first, unlearning_data(**data), 3).save_checkpoint(tmp_path / "run.ckpt")
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=5, max_epochs=-1, limit_val_batches=0, **quiet
    )
    trainer.fit(
        second,
        datamodule=unlearning_data(**data),
        ckpt_path=tmp_path / "run.ckpt",
        weights_only=True,
    )
    assert trainer.global_step == 5
    assert all(
        torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True)
    )
    assert torch.equal(second.guard.start, whole.guard.start) and torch.equal(
        second.guard.running, whole.guard.running
    )


# -- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"forget": "ga", "beta": 0.1},
            r"beta=0\.1: forget=ga does not read it \(it reads none of them\)",
        ),
        (
            {"forget": "npo", "delta": 0.0},
            r"delta=0\.0: forget=npo does not read it \(it reads beta\)",
        ),
        (
            {"forget": "satimp", "ascent": 0.1},
            r"ascent=0\.1: forget=satimp does not read it \(it reads beta, beta2\)",
        ),
        (
            {"forget": "npo", "retain": "bounded", "delta": 1.0},
            r"delta=1\.0: forget=npo with retain=bounded does not read it \(it reads ascent, beta",
        ),
        ({"forget": "npo", "beta": 0.0}, "beta=0: give a number > 0"),
        ({"forget": "bounded", "ascent": -0.1}, r"ascent=-0\.1: give a number >= 0"),
        ({"forget": "nonsense"}, "forget=nonsense: choose one of ga, bounded"),
        ({"retain": "nonsense"}, "retain=nonsense: choose one of none, nll"),
        ({"gamma": 0.0}, "gamma=0: nothing is forgotten"),
        ({"alpha": -1.0}, r"alpha=-1\.0: give a number >= 0"),
        ({"collapse_factor": 1.0}, r"collapse_factor=1\.0: give a number > 1"),
        ({"retain": "kl", "fused_loss": True}, "fused_loss=true: retain=kl reads the logits"),
        (
            {"forget": "undial", "fused_loss": True},
            "fused_loss=true: forget=undial reads the logits",
        ),
        ({"retain": "kl", "reference": "cached"}, "reference=cached: this loss reads logits"),
    ],
)
def test_invalid_unlearning_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(TemperError, match=rf"model\.init_args\.{message}"):
        make_module(UnlearningModule, unlearning_data(), **settings)


def test_options_replace_the_losses_own_defaults():
    assert module_of("satimp", "nll", beta2=2.0).options == {"beta": 5.0, "beta2": 2.0}
    assert module_of("simnpo", "nll", delta=-0.5).options == {"beta": 4.5, "delta": -0.5}


def test_half_of_the_rows_is_another_gradient():
    """The comparison above could not pass with rows left out."""
    half = {stream: select(rows, slice(0, 4)) for stream, rows in batches().items()}
    _, whole = one_step(module_of("ga", "nll"), batches())
    _, part = one_step(module_of("ga", "nll"), half)
    assert relative_error(part, whole) > 1e-3
