"""Every strategy with two processes equals one process with the whole batch, in float32."""

from typing import Any

import pytest

from tests.integration.strategy_runs import largest_difference, run_cases

pytestmark = pytest.mark.distributed
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OFFLOADED = {
    "stage 2, optimizer": {"stage": 2, "offload_optimizer": True},
    "stage 3, optimizer and weights": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}

# Three steps with clipping; the objective is Booster unless it says otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd with momentum": {"optimizer": "sgd"},
    "micro-batches": {"micro_batch_size": 1},
    "lora": {"lora": True},
    "activation checkpointing": {"checkpointing": True},
    "held": {"objective": "HeldBoosterModule", "settings": {"refresh_every": 2}},
    "vaccine": {"objective": "VaccineModule"},
    "vaccine, lora, micro-batches": {
        "objective": "VaccineModule",
        "lora": True,
        "micro_batch_size": 1,
    },
    "booster and vaccine": {"objective": "BoosterVaccineModule"},
    "sft": {"objective": "SFTModule"},
    "norms without decay": {
        "objective": "SFTModule",
        "optimizer": "decaying",
        "settings": {"decay_norm_and_bias": False},
    },
    "packed": {"objective": "SFTModule", "settings": {"packing": True}},
    "a pass that reaches some weights": {"objective": "UnevenModule"},
}
FOR_OFFLOADED = ("adamw", "micro-batches", "a pass that reaches some weights")
# Tolerances. Activations rounded to bfloat16: less than one of three steps of 1e-3. Weights rounded
# to bfloat16: one bit of a weight of 1, by which ZeRO's fp32 master weights may differ.
ROUNDED: dict[str, tuple[dict[str, Any], float]] = {
    "bf16-mixed": ({"precision": "bf16-mixed"}, 1e-3),
    "bf16 base, fp32 lora": ({"lora": True, "dtype": "bfloat16"}, 1e-3),
    "bf16-true": ({"precision": "bf16-true", "optimizer": "sgd"}, 2**-8),
    "bf16-true, a pass that reaches some": (
        {"precision": "bf16-true", "optimizer": "sgd", "objective": "UnevenModule"},
        2**-8,
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("strategies")
    variants = VARIANTS | {name: variant for name, (variant, _) in ROUNDED.items()}
    one = run_cases(
        folder,
        [{"name": name, "strategy": "auto", **variant} for name, variant in variants.items()],
        1,
    )
    cases = [
        {"name": f"{strategy}: {name}", "strategy": strategy, **variant}
        for strategy in STRATEGIES
        for name, variant in variants.items()
    ]
    cases += [
        {
            "name": f"{place}: {name}",
            "strategy": {"class_path": "strategies.ZeROStrategy", "init_args": options},
            **variants[name],
        }
        for place, options in OFFLOADED.items()
        for name in FOR_OFFLOADED
    ]
    return one, run_cases(folder, cases, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_equal_one(runs, strategy: str, name: str):
    one, two = runs
    assert largest_difference(two[f"{strategy}: {name}"], one[name]) < 1e-6


@pytest.mark.parametrize("place", OFFLOADED)
@pytest.mark.parametrize("name", FOR_OFFLOADED)
def test_offloading_changes_nothing(runs, place: str, name: str):
    one, two = runs
    assert largest_difference(two[f"{place}: {name}"], one[name]) < 1e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ROUNDED)
def test_two_ranks_nearly_equal_one_in_bfloat16(runs, strategy: str, name: str):
    one, two = runs
    assert largest_difference(two[f"{strategy}: {name}"], one[name]) <= ROUNDED[name][1]
