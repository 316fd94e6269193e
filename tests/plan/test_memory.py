"""What must hold of memory whatever is asked for, and figures that can be reckoned by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import BoosterModule, DPOModule, SFTModule, TARModule
from temper.models import LoRASpec, NetworkSpec
from temper.plan import Cost, Memory, Pass, Setup
from temper.plan.memory import STRATEGIES, state_bytes
from tests.plan.shapes import published, setup, small_shape

SHAPE = small_shape()
SPEC = NetworkSpec(path="x")
COSTS = [kind(SPEC).cost() for kind in (SFTModule, BoosterModule, DPOModule, TARModule)]
SETUPS = st.builds(
    setup,
    strategy=st.sampled_from(sorted(STRATEGIES)),
    devices=st.integers(1, 64),
    sequence_length=st.integers(8, 2048),
    batch_sizes=st.integers(1, 64).map(lambda rows: {None: rows}),
    micro_batch_size=st.none() | st.integers(1, 8),
    precision=st.sampled_from(["32-true", "bf16-mixed", "bf16-true"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    lora=st.none() | st.integers(1, 32).map(lambda rank: LoRASpec(rank=rank, targets="all-linear")),
    activation_checkpointing=st.booleans(),
    fused_loss=st.booleans(),
    state_bytes=st.sampled_from([0.0, 2.0, 8.0]),
)


@given(SETUPS, st.sampled_from(COSTS), st.integers(1, 64), st.sampled_from(["fsdp2", "zero3"]))
def test_more_devices_never_need_more_memory_where_everything_is_cut(
    asked: Setup, cost: Cost, more: int, strategy: str
):
    asked = replace(asked, strategy=strategy)
    larger = replace(asked, devices=asked.devices + more)
    assert Memory(SHAPE, larger, cost).peak.total <= Memory(SHAPE, asked, cost).peak.total


@given(SETUPS, st.sampled_from(COSTS), st.integers(1, 64))
def test_under_ddp_weights_and_what_goes_with_them_stay_what_they_are(
    asked: Setup, cost: Cost, devices: int
):
    asked = replace(asked, strategy="ddp")
    step, other = (
        Memory(SHAPE, each, cost).moments[-1] for each in (asked, replace(asked, devices=devices))
    )
    assert step == other and step.name == "optimizer step"


@given(SETUPS, st.sampled_from(COSTS))
def test_cutting_more_never_needs_more_between_passes(asked: Setup, cost: Cost):
    held = [
        Memory(SHAPE, replace(asked, strategy=name), cost) for name in ("zero1", "zero2", "zero3")
    ]
    state = [memory.moments[-1].parts["optimizer state"] for memory in held]
    assert state[0] == state[1] == state[2]
    assert (
        held[0].local_weights
        == held[1].local_weights
        >= held[2].local_weights - 4 * len(SHAPE.weights)
    )


@given(SETUPS, st.sampled_from(COSTS))
def test_parts_are_never_negative_and_smaller_micro_batches_never_need_more_activations(
    asked: Setup, cost: Cost
):
    whole, single = (
        Memory(SHAPE, replace(asked, micro_batch_size=None), cost),
        Memory(SHAPE, replace(asked, micro_batch_size=1), cost),
    )
    for left, right in zip(whole.moments, single.moments, strict=True):
        assert all(size >= 0 for size in left.parts.values())
        for part in ("activations", "logits"):
            both = sum(left.parts.get(name, 0) for name in ("activations", "logits", "gradients"))
            assert right.parts.get(part, 0) <= both


def test_full_fine_tuning_of_llama_2_by_hand():
    n = 6_738_415_616
    memory = Memory(published(), setup(batch_sizes={None: 1}), Cost((Pass(),), vectors=1))
    step = memory.moments[-1].parts
    assert (step["weights"], step["gradients"], step["optimizer state"], step["vectors"]) == (
        4 * n,
        4 * n,
        8 * n,
        4 * n,
    )


def test_offloading_moves_state_and_weights_to_the_host():
    asked = setup(strategy="zero3", devices=8)
    home, away = (
        Memory(SHAPE, replace(asked, offload_optimizer=on, offload_parameters=on), Cost((Pass(),)))
        for on in (False, True)
    )
    step = away.moments[-1].parts
    assert (step["weights"], step["optimizer state"], step["exact weights"], home.host) == (
        0,
        0,
        0,
        0,
    )
    assert away.host >= sum(
        home.moments[-1].parts[name] for name in ("weights", "optimizer state", "exact weights")
    )


def test_few_bits_are_half_a_byte_and_a_scale_but_for_embeddings_and_output_layer():
    shape, lora = published(), LoRASpec(rank=32, targets=["q_proj", "k_proj", "v_proj"])
    memory = Memory(shape, setup(dtype="bfloat16", lora=lora, quantization="nf4"), Cost((Pass(),)))
    linear, outside, adapter = (
        32 * (4 * 4096**2 + 3 * 4096 * 11008),
        2 * 32000 * 4096 + 65 * 4096,
        25_165_824,
    )
    assert memory.local_weights == pytest.approx(
        linear * (0.5 + 1 / 64 + 1 / 4096) + 2 * outside + 4 * adapter, rel=1e-6
    )


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (torch.optim.AdamW, 8),
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 4),
    ],
)
def test_the_state_of_an_optimizer_is_found_by_trying(make, size: int):
    assert state_bytes(make) == size


def test_eight_bit_moments_are_two_bytes_and_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert state_bytes(bitsandbytes.optim.AdamW8bit) == pytest.approx(2.03, abs=0.02)
