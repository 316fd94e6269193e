"""Memory and time of one Booster step at the shape of a 7-8B model on a CPU, and their plan.

    python benchmarks/shape_7b.py llama2_7b --weights nf4 [--append FILE]

Random weights in the model's shape, LoRA as in configs/model/, activation checkpointing, and a
whole step of `BoosterModule` under Lightning: three passes, the displacement, AdamW. bf16 needs
15 GiB (Llama-2-7B) or 17 GiB (Llama-3-8B) of free memory, nf4 6 or 8 GiB; with less the script does
not start.
"""

import argparse
import copy
import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_modules import BoosterModule
from temper.models import LoRASpec, NetworkSpec
from temper.models.blocks import checkpoint_activations
from temper.models.lora import add_lora, cast_trainable_to_fp32
from temper.models.quantize import prepare_quantized, quantization_settings
from temper.plan import Device, Plan, Setup, make_plan
from temper.plan.memory import measure_state_bytes
from temper.plan.shapes import find_architecture, model_shape

PATHS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3_8b": "meta-llama/Meta-Llama-3-8B"}
LORA = LoRASpec(32, 4, ["q_proj", "k_proj", "v_proj"])
# Weights repeat a block of so many random numbers: drawing billions would take minutes.
BLOCK = 2**22
GIB = 2**30


class RandomBooster(BoosterModule):
    """Booster on random weights."""

    def configure_model(self) -> None:
        """Build a network of random weights."""
        if self.network is None:
            self.network = random_network(self.network_spec).train()


class Stopwatch(L.Callback):
    """Measures the seconds of the training step."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.begin


def random_network(spec: NetworkSpec) -> nn.Module:
    """Network of the spec's shape, made tensor by tensor in its final dtype or quantization, so
    that it is never in memory in a larger form.
    """
    config = find_architecture(spec).config
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if spec.quantization:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        network.config.quantization_config = quantization_settings(spec)["quantization_config"]
        network = replace_with_bnb_linear(network, ["lm_head"], network.config.quantization_config)
        network.is_loaded_in_4bit = True
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    # By shape: quantizing takes a second for 16 million weights.
    quantized: dict[torch.Size, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not hasattr(weight, "quant_type"):
                setattr(module, name, nn.Parameter(_random_values(weight.shape, block)))
                continue
            if weight.shape not in quantized:
                values = _random_values(weight.shape, block)
                parameter = type(weight)(values, requires_grad=False, **weight.__dict__)
                quantized[weight.shape] = parameter.to("cpu")  # quantizes
            setattr(module, name, copy.deepcopy(quantized[weight.shape]))
    # Its buffers are on the meta device.
    network.model.rotary_emb = type(network.model.rotary_emb)(config)
    if spec.quantization:
        prepare_quantized(network)
    network = cast_trainable_to_fp32(add_lora(network, LORA))
    checkpoint_activations(network)
    return network


def _random_values(shape: torch.Size, block: torch.Tensor) -> torch.Tensor:
    """Random numbers for matrices, ones for the weights of norms."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    value = torch.empty(shape, dtype=torch.bfloat16)
    for chunk in value.view(-1).split(BLOCK):
        chunk.copy_(block[: chunk.numel()])
    return value


def make_batch(rows: int, tokens: int, vocabulary: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random rows of both streams; the second half of a row is labelled."""
    generator = torch.Generator().manual_seed(1)
    batch = {}
    for stream in ("alignment", "harmful"):
        ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        batch[stream] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return batch


def plan_step(spec: NetworkSpec, module: BoosterModule, rows: int, tokens: int) -> Plan:
    """Plan of this run on one device; its memory and FLOPs are used, not its time."""
    setup = Setup(
        "auto",
        1,
        tokens,
        {None: rows},
        dtype=spec.dtype,
        quantization=spec.quantization,
        lora=LORA,
        activation_checkpointing=True,
        state_bytes=measure_state_bytes(module.optimizer_factory),
        on_cpu=True,
    )
    return make_plan(
        "Booster", model_shape(find_architecture(spec)), setup, module.cost(), Device(24, 1, 1)
    )


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


class Measurement(NamedTuple):
    """Peak memory (bytes), seconds of the training step, and seconds of everything before it."""

    peak: int
    seconds: float
    setup_seconds: float


def measure_step(module: BoosterModule, rows: dict[str, dict[str, torch.Tensor]]) -> Measurement:
    """Build the network and take one step; memory is counted over what the process had before."""
    import peft  # noqa: F401  # imported before memory is measured
    import transformers.integrations.bitsandbytes  # noqa: F401

    gc.collect()
    before = psutil.Process().memory_info().rss
    watch = Stopwatch()
    start = time.perf_counter()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader([rows], batch_size=None))  # type: ignore[arg-type]
    elapsed = time.perf_counter() - start
    return Measurement(peak_rss() - before, watch.seconds, elapsed - watch.seconds)


def main() -> None:
    """Run one step and print a row of the table in scale.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=PATHS)
    parser.add_argument("--weights", choices=["bf16", "nf4"], default="nf4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1, help="rows of each stream")
    parser.add_argument("--append", type=Path, help="file that the row is appended to")
    options = parser.parse_args()
    nf4 = "nf4" if options.weights == "nf4" else None
    spec = NetworkSpec(
        PATHS[options.model],
        dtype="bfloat16",
        quantization=nf4,
        lora=LORA,
        activation_checkpointing=True,
    )
    module = RandomBooster(spec, lam=5.0, alpha=0.1, packing=False)
    plan = plan_step(spec, module, options.rows, options.tokens)
    free = psutil.virtual_memory().available
    if free < 1.08 * plan.peak.total + GIB:
        raise SystemExit(
            f"not started: {plan.peak.total / GIB:.1f} GiB planned, and {free / GIB:.1f} GiB of"
            " memory free; free some, or use --weights nf4"
        )
    vocabulary = model_shape(find_architecture(spec)).vocabulary
    measured = measure_step(module, make_batch(options.rows, options.tokens, vocabulary))
    cells = [
        options.model,
        options.weights,
        f"{plan.trainable:,} of {plan.parameters:,}",
        f"{options.rows} x {options.tokens}",
        f"{measured.peak / GIB:.2f}",
        f"{plan.peak.total / GIB:.2f}",
        f"{plan.peak.total / measured.peak - 1:+.1%}",
        f"{measured.seconds:.0f}",
        f"{plan.work.flops / 1e12:.2f}",
        f"{plan.work.flops / measured.seconds / 1e12:.3f}",
        f"{measured.setup_seconds:.0f}",
    ]
    row = "| " + " | ".join(cells) + " |"
    moved = float(module.weights.displacement_cosine or 0)
    print(
        f"{row}\nstep taken: {module.skipped_steps == 0}; cosine of the displacement: {moved:.4f};"
        f" {torch.get_num_threads()} threads"
    )
    if options.append:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


if __name__ == "__main__":
    main()
