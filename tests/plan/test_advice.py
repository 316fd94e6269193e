"""Changes that make a run fit; FLOPs, tokens and communication of a step."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import BoosterModule, SFTModule
from temper.models import LoRASpec, NetworkSpec
from temper.plan import Cost, Device, Memory, Pass, make_plan
from temper.plan.advice import GIB, RESERVE, recommend_changes, usable_bytes
from temper.plan.report import estimate_communication, estimate_work
from tests.plan.shapes import published, setup, small_shape

SHAPE = published()
SFT, BOOSTER = (kind(NetworkSpec(path="x")).cost() for kind in (SFTModule, BoosterModule))
PAPER = LoRASpec(rank=32, alpha=4, targets=["q_proj", "k_proj", "v_proj"])


def test_a_run_that_fits_needs_no_change():
    given_setup = setup(lora=PAPER, dtype="bfloat16", activation_checkpointing=True)
    assert recommend_changes(SHAPE, given_setup, BOOSTER, 80) == []


def test_the_first_change_is_the_first_that_makes_it_fit():
    given_setup = setup(lora=PAPER, dtype="bfloat16", sequence_length=1024)
    (change,) = recommend_changes(SHAPE, given_setup, BOOSTER, 80)
    assert (
        change.setting == "model.init_args.network.activation_checkpointing=true"
        and change.same_result
        and change.fits
    )
    assert (
        change.peak
        == Memory(SHAPE, replace(given_setup, activation_checkpointing=True), BOOSTER).peak.total
    )


def test_micro_batches_are_as_large_as_they_can_be():
    given_setup = setup(
        lora=PAPER, dtype="bfloat16", sequence_length=2048, activation_checkpointing=True
    )
    (change,) = recommend_changes(SHAPE, given_setup, BOOSTER, 24)
    assert change.setting == "model.init_args.micro_batch_size=4"
    assert (
        Memory(SHAPE, replace(given_setup, micro_batch_size=8), BOOSTER).peak.total
        > usable_bytes(24)
        >= change.peak
    )


def test_changes_are_combined_where_no_single_one_is_enough():
    changes = recommend_changes(
        SHAPE, setup(sequence_length=2048, devices=2, strategy="ddp"), BOOSTER, 24
    )
    assert len(changes) > 1 and changes[-1].fits and not any(change.fits for change in changes[:-1])
    peaks = [change.peak for change in changes]
    assert peaks == sorted(peaks, reverse=True)


def test_a_run_that_no_change_makes_fit_does_not_fit():
    changes = recommend_changes(SHAPE, setup(), BOOSTER, 0.25)
    assert changes and not changes[-1].fits
    plan = make_plan("Booster", SHAPE, setup(), BOOSTER, Device(0.25, 312, 0.4))
    assert not plan.fits and plan.as_json()["fits"] is False


@given(
    st.floats(1, 200), st.integers(1, 4), st.sampled_from(["float32", "bfloat16"]), st.booleans()
)
def test_a_change_that_is_recommended_fits(
    device_gib: float, devices: int, dtype: str, adapter: bool
):
    shape = small_shape(hidden_size=1024, intermediate_size=4096, vocab_size=32000)
    given_setup = setup(
        devices=devices,
        strategy="ddp",
        dtype=dtype,
        lora=PAPER if adapter else None,
        sequence_length=4096,
    )
    changes = recommend_changes(shape, given_setup, BOOSTER, device_gib)
    fits = Memory(shape, given_setup, BOOSTER).peak.total <= device_gib * GIB * (1 - RESERVE)
    assert fits == (changes == [])
    if changes:
        assert changes[-1].fits == (changes[-1].peak <= usable_bytes(device_gib))


def test_sft_takes_six_flops_per_weight_and_token():
    memory = Memory(SHAPE, setup(sequence_length=8), SFT)
    linear = sum(x.inputs * x.outputs for x in SHAPE.linears)
    done = estimate_work(memory)
    assert (done.tokens, done.passes) == (16 * 8, 1)
    assert done.flops / done.tokens == pytest.approx(6 * linear, rel=1e-3)
    assert done.seconds(2, 100, 0.5) == pytest.approx(done.flops / 1e14)


def test_flops_of_a_frozen_base_and_of_checkpointing():
    plain, adapter, again = (
        estimate_work(Memory(SHAPE, setup(sequence_length=8, **more), SFT)).flops
        for more in ({}, {"lora": PAPER}, {"activation_checkpointing": True})
    )
    assert adapter / plain == pytest.approx(2 / 3, rel=0.02)
    assert again / plain == pytest.approx(4 / 3, rel=0.02)
    assert estimate_work(Memory(SHAPE, setup(sequence_length=8), BOOSTER)).flops == pytest.approx(
        3 * plain
    )


def test_booster_reductions_under_ddp_and_sharded_gradients():
    n = SHAPE.parameters
    ddp = estimate_communication(Memory(SHAPE, setup(strategy="ddp", devices=8), BOOSTER))
    assert (ddp.reductions, ddp.gathers) == (2, 0)
    assert ddp.bytes == pytest.approx(2 * 2 * 7 / 8 * 4 * n)
    fsdp = estimate_communication(Memory(SHAPE, setup(strategy="fsdp2", devices=8), BOOSTER))
    assert (fsdp.reductions, fsdp.gathers) == (3, 6)
    assert fsdp.bytes == pytest.approx((3 + 6) * 7 / 8 * 4 * n)
    zero2 = estimate_communication(Memory(SHAPE, setup(strategy="zero2", devices=8), BOOSTER))
    assert (zero2.reductions, zero2.gathers) == (
        3,
        3,
    ), "at the displaced weights, back, and after the step"
    assert estimate_communication(Memory(SHAPE, setup(), BOOSTER)).bytes == 0


def test_micro_batches_gather_and_reduce_again():
    given_setup = setup(strategy="fsdp2", devices=2, batch_sizes={None: 16})
    once, often = (
        estimate_communication(Memory(SHAPE, replace(given_setup, micro_batch_size=size), SFT))
        for size in (8, 2)
    )
    assert (often.reductions, often.gathers) == (4 * once.reductions, 4 * once.gathers)
    assert often.bytes == pytest.approx(4 * once.bytes)


def test_a_forward_pass_is_a_third_of_one_with_gradients():
    forward = Memory(SHAPE, setup(), Cost((Pass(gradient="none"),)))
    assert estimate_work(forward).flops * 3 == pytest.approx(
        estimate_work(Memory(SHAPE, setup(), SFT)).flops
    )
