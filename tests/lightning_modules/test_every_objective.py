"""Properties of every objective, run over one list of them."""

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml

import lightning_modules
from lightning_modules.base import ObjectiveModule
from lightning_modules.reference import ReferenceModule
from temper.data.packing import plan_packing
from temper.errors import TemperError
from tests.objective_cases import CASES, Case
from tests.objectives import fit, make_module, weights

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "objective").glob("*.yaml"))
# Bases, and what is not trained by gradients of a stream (they have test files of their own).
APART = {
    "ObjectiveModule",
    "ReferenceModule",
    "ForgetRetainModule",
    "AntidoteModule",
    "SOMFModule",
    "StoredAnswers",
}


def trained(
    case: Case, steps: int = 3, data: Any = None, double: bool = True, **settings: Any
) -> ObjectiveModule:
    data = data or case.make_data()
    settings.setdefault("optimizer", partial(torch.optim.AdamW, lr=1e-2, eps=1e-3))
    module = make_module(case.kind, data, double, **(case.settings | settings))
    fit(module, data, steps)
    return module


def test_every_objective_has_a_case():
    assert {case.name for case in CASES} | APART == set(lightning_modules.__all__)


def test_every_objective_has_a_config_and_an_index_line():
    named = {yaml.safe_load(path.read_text())["model"]["class_path"] for path in CONFIGS}
    index = (ROOT / "docs" / "paper_index.md").read_text()
    bases = {
        "ObjectiveModule",
        "ReferenceModule",
        "ForgetRetainModule",
        "StoredAnswers",
    }  # or no objective at all
    for name in set(lightning_modules.__all__) - bases:
        assert name in named, f"no file in configs/objective has class_path {name}"
        assert name in index, f"docs/paper_index.md does not mention {name}"
    for path in CONFIGS:
        assert f"configs/objective/{path.name}" in index, (
            f"docs/paper_index.md does not mention {path.name}"
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_into_its_class(
    path: Path, command_line: Any, capsys: pytest.CaptureFixture[str]
):
    extra = ["--model.init_args.safe=x"] if path.stem == "somf" else []
    with pytest.raises(SystemExit) as left:
        command_line(
            "fit",
            f"--config={path}",
            "--data=SyntheticAlignment",
            "--model.init_args.network.path=x",
            *extra,
            "--print_config",
        )
    shown = capsys.readouterr()
    assert left.value.code in (0, None), shown.err
    assert (
        yaml.safe_load(shown.out)["model"]["class_path"]
        == f"lightning_modules.{yaml.safe_load(path.read_text())['model']['class_path']}"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_learns_counts_and_logs(case: Case):
    data = case.make_data()
    module = make_module(case.kind, data, **case.settings)
    before = weights(module)
    trainer = fit(module, data, 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))
    assert module.work.passes >= 2 and int(module.work.tokens) > 0 and module.skipped_steps == 0
    losses = {
        name: value for name, value in trainer.callback_metrics.items() if name.startswith("loss/")
    }
    assert losses and all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_change_nothing_or_are_refused(case: Case, size: int):
    if case.batch_statistic:
        with pytest.raises(TemperError, match=f"micro_batch_size={size}"):
            trained(case, micro_batch_size=size)
        return
    whole = trained(case)
    split = trained(case, micro_batch_size=size)
    for left, right in zip(weights(whole), weights(split), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    assert vars(split.work) == vars(whole.work), "cost is counted as if there were no micro-batches"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fused_loss_changes_nothing_or_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch):
    if case.reads_logits:
        with pytest.raises(TemperError, match="fused_loss=true"):
            trained(case, fused_loss=True)
        return
    plain = trained(case)
    with monkeypatch.context() as patch:  # no logits anywhere, in the policy or in the reference
        patch.setattr(
            sys.modules["temper.models.score"], "token_logps", None
        )  # the package has a function of that name
        fused = trained(case, fused_loss=True)
    for left, right in zip(weights(plain), weights(fused), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_changes_nothing_or_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch):
    if case.kind.unpackable:
        with pytest.raises(TemperError, match=f"packing=true: {case.name} "):
            trained(case, packing=True)
        return
    plain = trained(case)
    plans = []
    scoring = sys.modules["temper.models.score"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "temper.data.packing.WORTH_IT", 100
        )  # these batches are so small that it hardly is
        patch.setattr(
            scoring, "plan_packing", lambda *words: plans.append(plan_packing(*words)) or plans[-1]
        )
        packed = trained(case, packing=True)
    assert any(plan is not None for plan in plans), "nothing was packed, so nothing was compared"
    for left, right in zip(weights(plain), weights(packed), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    assert vars(packed.work) == vars(plain.work), (
        "cost is counted in tokens, which packing does not change"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_trains_adapters_alone(case: Case):
    data = case.make_data()
    module = make_module(case.kind, data, double=False, lora=True, **case.settings)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, data, 3)
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    if isinstance(module, ReferenceModule):
        assert module.reference_source == "adapter_off"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(case: Case, tmp_path: Path):
    straight = trained(case, 5, double=False)
    data = case.make_data()
    first = make_module(
        case.kind,
        data,
        double=False,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, eps=1e-3),
        **case.settings,
    )
    fit(first, data, 3).save_checkpoint(tmp_path / "run.ckpt")
    data = case.make_data()
    second = make_module(
        case.kind,
        data,
        double=False,
        optimizer=partial(torch.optim.AdamW, lr=1e-2, eps=1e-3),
        **case.settings,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=5,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(second, datamodule=data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(straight), strict=True))
    assert (second.work.passes, second.work.forwards) == (
        straight.work.passes,
        straight.work.forwards,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_non_finite_loss_changes_no_weight(case: Case):
    data = case.make_data()
    module = make_module(case.kind, data, **case.settings)
    honest = module.score
    before = weights(module)

    def poisoned(rows: Any, *arguments: Any, **options: Any) -> Any:
        poison = lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor  # noqa: E731
        return honest(rows, *arguments, **options)._map(poison)

    module.score = poisoned
    with pytest.raises((RuntimeError, TemperError), match="non-finite|not finite"):
        module.max_skipped_steps = 2
        fit(module, data, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


def test_no_objective_calls_the_optimizer_or_backward_itself():
    """Shared steps live in the base and in the weight space."""
    for path in (ROOT / "lightning_modules").glob("*.py"):
        if path.stem in ("base", "antidote"):
            continue
        text = path.read_text()
        assert (
            not re.search(r"\.backward\(|self\.optimizers\(\)|clip_grad|\.zero_grad\(\)", text)
            or path.stem == "tar"
        ), path
