"""Memory of a step: properties over all setups, and values computed by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import BoosterModule, DPOModule, SFTModule, TARModule
from temper.models import LoRASpec, NetworkSpec
from temper.plan import Cost, Memory, Pass, Setup
from temper.plan.memory import STRATEGIES, measure_state_bytes
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
def test_sharding_over_more_devices_needs_no_more_memory(
    given_setup: Setup, cost: Cost, more: int, strategy: str
):
    given_setup = replace(given_setup, strategy=strategy)
    larger = replace(given_setup, devices=given_setup.devices + more)
    assert Memory(SHAPE, larger, cost).peak.total <= Memory(SHAPE, given_setup, cost).peak.total


@given(SETUPS, st.sampled_from(COSTS), st.integers(1, 64))
def test_ddp_optimizer_memory_does_not_depend_on_devices(
    given_setup: Setup, cost: Cost, devices: int
):
    given_setup = replace(given_setup, strategy="ddp")
    step, other = (
        Memory(SHAPE, each, cost).phases[-1]
        for each in (given_setup, replace(given_setup, devices=devices))
    )
    assert step == other and step.name == "optimizer step"


@given(SETUPS, st.sampled_from(COSTS))
def test_more_sharding_never_needs_more_between_passes(given_setup: Setup, cost: Cost):
    held = [
        Memory(SHAPE, replace(given_setup, strategy=name), cost)
        for name in ("zero1", "zero2", "zero3")
    ]
    state = [memory.phases[-1].components["optimizer state"] for memory in held]
    assert state[0] == state[1] == state[2]
    assert (
        held[0].local_weights
        == held[1].local_weights
        >= held[2].local_weights - 4 * len(SHAPE.weights)
    )


@given(SETUPS, st.sampled_from(COSTS))
def test_memory_is_not_negative_and_grows_with_micro_batches(given_setup: Setup, cost: Cost):
    whole = Memory(SHAPE, replace(given_setup, micro_batch_size=None), cost)
    single = Memory(SHAPE, replace(given_setup, micro_batch_size=1), cost)
    for left, right in zip(whole.phases, single.phases, strict=True):
        assert all(size >= 0 for size in left.components.values())
        for component in ("activations", "logits"):
            both = sum(
                left.components.get(name, 0) for name in ("activations", "logits", "gradients")
            )
            assert right.components.get(component, 0) <= both


def test_full_fine_tuning_of_llama_2_by_hand():
    n = 6_738_415_616
    memory = Memory(published(), setup(batch_sizes={None: 1}), Cost((Pass(),), vectors=1))
    step = memory.phases[-1].components
    assert (
        step["weights"],
        step["gradients"],
        step["optimizer state"],
        step["extra float32 vectors"],
    ) == (
        4 * n,
        4 * n,
        8 * n,
        4 * n,
    )


def test_offloading_moves_state_and_weights_to_the_host():
    given_setup = setup(strategy="zero3", devices=8)
    home, away = (
        Memory(
            SHAPE,
            replace(given_setup, offload_optimizer=on, offload_parameters=on),
            Cost((Pass(),)),
        )
        for on in (False, True)
    )
    step = away.phases[-1].components
    assert (
        step["weights"],
        step["optimizer state"],
        step["float32 master weights"],
        home.host,
    ) == (
        0,
        0,
        0,
        0,
    )
    assert away.host >= sum(
        home.phases[-1].components[name]
        for name in ("weights", "optimizer state", "float32 master weights")
    )


def test_nf4_weights_take_half_a_byte_and_scales():
    shape = published()
    lora = LoRASpec(rank=32, targets=["q_proj", "k_proj", "v_proj"])
    memory = Memory(shape, setup(dtype="bfloat16", lora=lora, quantization="nf4"), Cost((Pass(),)))
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    outside = 2 * 32000 * 4096 + 65 * 4096
    adapter = 25_165_824
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
def test_optimizer_state_is_measured(make, size: int):
    assert measure_state_bytes(make) == size


def test_8_bit_adam_state_is_two_bytes_and_scales():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert measure_state_bytes(bitsandbytes.optim.AdamW8bit) == pytest.approx(2.03, abs=0.02)
