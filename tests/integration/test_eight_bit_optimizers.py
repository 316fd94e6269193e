"""Optimizers of bitsandbytes from the command line: a fit, and an exact resumption."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes")
WRAPPED = "__bnb_optimizer_quant_state__"
CONFIGS = {"AdamW8bit": "adamw8bit", "PagedAdamW8bit": "paged_adamw8bit"}
CHECKPOINT = (
    "--trainer.enable_checkpointing=true",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.val_check_interval=null",
)


pytestmark = pytest.mark.slow


def _fit(temper, folder: Path, steps: int, config: str, *words: str) -> dict:
    temper(
        "fit",
        folder,
        f"--config=configs/optimizer/{config}.yaml",
        f"--trainer.max_steps={steps}",
        *CHECKPOINT,
        *words,
    )
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=True)


def _moments(checkpoint: dict) -> dict[int, dict]:
    """Adam's state by parameter; bitsandbytes wraps the quantised part of it."""
    states = checkpoint["optimizer_states"][0]["state"]
    return {
        number: {k: v for k, v in (state | state.get(WRAPPED, {})).items() if k != WRAPPED}
        for number, state in states.items()
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_run_equals_an_uninterrupted_one(temper, tmp_path, kind):
    whole = _fit(temper, tmp_path / "whole", 3, CONFIGS[kind])
    _fit(temper, tmp_path / "first", 2, CONFIGS[kind])
    resumed = _fit(
        temper,
        tmp_path / "second",
        3,
        CONFIGS[kind],
        f"--ckpt_path={next((tmp_path / 'first').rglob('last.ckpt'))}",
    )
    assert whole["global_step"] == resumed["global_step"] == 3
    assert all(
        torch.equal(whole["state_dict"][name], value)
        for name, value in resumed["state_dict"].items()
    )
    states = [_moments(checkpoint) for checkpoint in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][key]))
            for key, value in state.items()
        )


def test_moments_are_in_8_bits_but_for_small_tensors(temper, tmp_path):
    checkpoint = _fit(temper, tmp_path, 1, "adamw8bit")
    moments = {
        (state["state1"].dtype, state["state1"].numel() >= 4096)
        for state in _moments(checkpoint).values()
    }
    assert moments == {(torch.uint8, True), (torch.float32, False)}


def test_norms_may_be_exempt_from_decay_in_8_bits(temper, tmp_path):
    words = (
        "--model.init_args.decay_norm_and_bias=false",
        "--model.init_args.optimizer.init_args.weight_decay=0.1",
    )
    _fit(temper, tmp_path / "first", 1, "adamw8bit", *words)
    resumed = _fit(
        temper,
        tmp_path / "second",
        2,
        "adamw8bit",
        *words,
        f"--ckpt_path={next((tmp_path / 'first').rglob('last.ckpt'))}",
    )
    groups = resumed["optimizer_states"][0]["param_groups"]
    assert resumed["global_step"] == 2 and [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_any_of_its_optimizers_is_taken_by_its_path(temper, tmp_path):
    checkpoint = _fit(
        temper, tmp_path, 1, "adamw8bit", "--model.init_args.optimizer=bitsandbytes.optim.Lion8bit"
    )
    assert all("state2" not in state for state in _moments(checkpoint).values())
