"""Planned memory of a forward and backward pass against the peak of torch's allocator."""

import contextlib
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from strategies import WeightSpace
from temper.losses import nll
from temper.models import LoRASpec
from temper.models.blocks import checkpoint_activations
from temper.models.lora import add_lora, cast_trainable_to_fp32
from temper.models.score import score
from temper.plan import Cost, Memory, Pass
from tests.plan.memory_worker import peak_of
from tests.plan.shapes import setup, small_config, small_shape

ROWS = 4
LENGTH = 96
LORA = LoRASpec(rank=8, targets=["q_proj", "k_proj", "v_proj"])
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "grouped queries": {"num_key_value_heads": 2},
    "a large vocabulary": {"vocab_size": 6000},
    "checkpointed": {"activation_checkpointing": True},
    "fused": {"vocab_size": 6000, "fused_loss": True},
    "fused, checkpointed, bfloat16": {
        "vocab_size": 6000,
        "fused_loss": True,
        "dtype": "bfloat16",
        "activation_checkpointing": True,
    },
    "bfloat16": {"dtype": "bfloat16"},
    "autocast": {"precision": "bf16-mixed"},
    "adapter": {"lora": LORA},
    "adapter on bfloat16": {"lora": LORA, "dtype": "bfloat16"},
    "adapter on bfloat16, checkpointed": {
        "lora": LORA,
        "dtype": "bfloat16",
        "activation_checkpointing": True,
    },
    "adapter on bfloat16, autocast": {"lora": LORA, "dtype": "bfloat16", "precision": "bf16-mixed"},
    "qwen2": {"kind": "qwen2"},
    "gemma2": {"kind": "gemma2", "vocab_size": 2000, "attention": "eager"},
    "gpt2": {"kind": "gpt2"},
}
OF_SETUP = ("activation_checkpointing", "fused_loss", "dtype", "precision", "lora", "attention")


def _measured(config: Any, options: dict[str, Any]) -> int:
    """Peak of one forward and backward pass, weights not counted."""
    torch.manual_seed(0)
    network: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=options.get("attention")
    )
    network = network.to(getattr(torch, options.get("dtype", "float32"))).train()
    if "lora" in options:
        network = cast_trainable_to_fp32(add_lora(network, options["lora"]))
    if options.get("activation_checkpointing"):
        checkpoint_activations(network)
    ids = torch.randint(3, 100, (ROWS, LENGTH))
    attention = torch.ones_like(ids)
    attention[0, -3:] = 0
    rows = {"input_ids": ids, "attention_mask": attention, "labels": ids.clone()}
    mixed = options.get("precision") == "bf16-mixed"
    space = WeightSpace({name: p for name, p in network.named_parameters() if p.requires_grad})
    loss = lambda rows: nll(score(network, rows, fused=options.get("fused_loss", False)))  # noqa: E731
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, autocast:
        space.gradient(loss, rows)
    return peak_of(profiler)


@pytest.mark.parametrize("name", CASES)
def test_a_pass_takes_the_planned_memory(name: str):
    options = {key: value for key, value in CASES[name].items() if key in OF_SETUP}
    changes = {key: value for key, value in CASES[name].items() if key not in (*OF_SETUP, "kind")}
    kind = CASES[name].get("kind", "llama")
    measured = _measured(small_config(kind, **changes), options)
    run_setup = setup(
        sequence_length=LENGTH, batch_sizes={None: ROWS}, on_cpu=True, state_bytes=0.0, **options
    )
    memory = Memory(small_shape(kind, **changes), run_setup, Cost((Pass(),)))
    planned = max(phase.total - phase.components["weights"] for phase in memory.phases[:-1])
    assert planned == pytest.approx(measured, rel=0.1)
