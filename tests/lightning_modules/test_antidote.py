"""Antidote's zeroed weights against plain loops, and its laws."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from lightning_modules.antidote import AntidoteModule
from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, build_network
from tests.objectives import SHAPE, exact_network, fit, global_batches, make_data


def make(double: bool = True, lora: bool = False, **settings: Any) -> Any:
    spec = NetworkSpec(shape=SHAPE, lora=LoRASpec(rank=4, alpha=4) if lora else None)
    module = AntidoteModule(spec, **settings)
    tokenizer = make_data().tokenizer
    module.network = exact_network(len(tokenizer)) if double else build_network(spec, tokenizer)
    return module


def state(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.network.state_dict().items()}


def plain_zeros(
    network: torch.nn.Module, batches: list, stream: str, ratio: float
) -> dict[str, set[tuple[int, int]]]:
    """Positions (output, input) to zero: inputs of every layer row by row without padding, token by
    token.
    """
    network = copy.deepcopy(network).eval()
    seen = {}
    kinds = {
        "c_attn",
        "c_proj",
        "c_fc",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    layers = {
        name: module for name, module in network.named_modules() if name.rsplit(".", 1)[-1] in kinds
    }
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _m, inputs, name=name: seen.setdefault(name, []).extend(inputs[0][0].double())
        )
    for batch in batches:
        for ids, mask in zip(
            batch[stream]["input_ids"], batch[stream]["attention_mask"], strict=True
        ):
            with torch.no_grad():
                network(input_ids=ids[mask.bool()][None])
    zeros = {}
    for name, layer in layers.items():
        weight = layer.weight.detach().double()
        weight = weight.T if hasattr(layer, "nf") else weight  # GPT-2 keeps inputs first
        mean = sum(x**2 for x in seen[name]) / len(seen[name])
        n_top = weight.shape[1] - int(weight.shape[1] * (1 - ratio))
        zeros[name] = set()
        for i, row in enumerate(weight):
            scores = [
                (float(abs(w) * m.sqrt()), j)
                for j, (w, m) in enumerate(zip(row, mean, strict=True))
            ]
            zeros[name] |= {(i, j) for _, j in sorted(scores)[len(scores) - n_top :]}
    return zeros


def zeroed(before: dict, after: dict) -> dict[str, set[tuple[int, int]]]:
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    found = {}
    for name in changed:
        moved = before[name] != after[name]
        assert (after[name][moved] == 0).all(), name
        moved = moved.T if ".h." in name and "c_" in name else moved
        found[name.removesuffix(".weight")] = {tuple(place) for place in moved.nonzero().tolist()}
    return found


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_the_zeroed_weights_are_those_of_a_plain_loop(double, ratio):
    module = make(double, ratio=ratio)
    start = state(module)
    network = copy.deepcopy(module.network)
    trainer = fit(module, make_data(), 3)
    assert trainer.global_step == 3
    assert zeroed(start, state(module)) == plain_zeros(
        network, global_batches(make_data(), 3), "harmful", ratio
    )


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_zero_the_same_weights(size):
    whole = make()
    split = make(micro_batch_size=size)
    fit(whole, make_data(), 2)
    fit(split, make_data(), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(state(whole).values(), state(split).values(), strict=True)
    )


def test_statistics_of_ranks_add_up_to_the_whole_batch():
    def squares(rank: int, world: int) -> dict[str, torch.Tensor]:
        module = make()
        data = make_data()
        module.prune = lambda: None
        data._ranks = lambda: (rank, world)
        fit(module, data, 2)
        return module.squares

    whole = squares(0, 1)
    left = squares(0, 2)
    right = squares(1, 2)
    for name, total in whole.items():
        torch.testing.assert_close(left[name] + right[name], total, rtol=1e-6, atol=0)
        assert not torch.equal(left[name], total)


def test_dropout_is_off_while_it_looks_and_back_on_afterwards():
    quiet = make()
    noisy = make()
    for module in noisy.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    fit(quiet, make_data(), 1)
    fit(noisy, make_data(), 1)
    assert noisy.network.training
    assert all(
        torch.equal(a, b) for a, b in zip(state(noisy).values(), state(quiet).values(), strict=True)
    )


def test_ratio_zero_changes_no_bit():
    module = make(ratio=0.0)
    start = state(module)
    fit(module, make_data(), 2)
    assert all(torch.equal(start[name], value) for name, value in state(module).items())


def test_the_stream_is_a_choice():
    module = make(stream="alignment", ratio=0.2)
    start = state(module)
    network = copy.deepcopy(module.network)
    fit(module, make_data(), 1)
    assert zeroed(start, state(module)) == plain_zeros(
        network, global_batches(make_data(), 1), "alignment", 0.2
    )


def test_the_last_validation_sees_zeroed_weights():
    seen = []

    class Look(L.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.pruned)

    fit(
        make(),
        make_data(),
        2,
        limit_val_batches=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[Look()],
    )
    assert seen == [False, True]


def test_without_max_steps_it_is_done_when_training_ends():
    module = make()
    other = make()
    fit(module, make_data(), -1, max_epochs=1, limit_train_batches=2)
    fit(other, make_data(), 2)
    assert module.pruned and all(
        torch.equal(a, b)
        for a, b in zip(state(module).values(), state(other).values(), strict=True)
    )


def test_a_continued_adapter_alone_is_zeroed():
    module = make(double=False, ratio=0.3)
    adapted = NetworkSpec(shape=SHAPE, lora=LoRASpec(rank=2, alpha=4))
    module.network = build_network(
        adapted, make_data().tokenizer
    )  # as a folder with an adapter gives it
    for name, parameter in module.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    start = state(module)
    fit(module, make_data(), 1)
    changed = {name for name, value in state(module).items() if not torch.equal(start[name], value)}
    assert changed == {name for name in start if "lora_" in name}


def test_new_adapters_and_non_finite_statistics_are_refused():
    with pytest.raises(TemperError, match=r"network.lora: a new adapter holds nothing to zero"):
        make(double=False, lora=True)
    module = make()
    start = state(module)
    module.squares = {
        name: torch.full((layer.weight.shape[0],), float("nan"))
        for name, layer in module.layers().items()
    }
    with pytest.raises(RuntimeError, match="nothing was zeroed"):
        module.prune()
    assert all(torch.equal(start[name], value) for name, value in state(module).items())


def test_forward_passes_are_counted_and_no_hook_stays():
    module = make(micro_batch_size=2)
    fit(module, make_data(), 3)
    tokens = sum(
        int(batch["harmful"]["attention_mask"].sum()) for batch in global_batches(make_data(), 3)
    )
    assert (module.work.passes, module.work.forwards, int(module.work.forward_tokens)) == (
        0,
        3,
        tokens,
    )
    assert not any(m._forward_pre_hooks for m in module.network.modules())


def test_resuming_in_the_middle_equals_never_having_stopped(tmp_path: Path):
    whole = make()
    first = make()
    second = make()
    fit(whole, make_data(), 4)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    fit(first, make_data(), 3, callbacks=[Save()])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(second, datamodule=make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(state(second).values(), state(whole).values(), strict=True)
    )
    assert second.work.forwards == 4


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(TemperError, match=f"model.init_args.ratio={ratio}"):
        AntidoteModule(NetworkSpec(shape=SHAPE), ratio=ratio)


def test_a_stream_that_the_data_do_not_have_is_refused():
    with pytest.raises(TemperError, match="reads the stream 'realignment'"):
        fit(make(stream="realignment"), make_data(), 1)
