"""One whole Booster step at the shape of a 7-8B model, on a CPU: python benchmarks/shape_7b.py
llama2_7b --weights nf4 [--append FILE].

Random weights in the model's own shape, LoRA as in configs/model/, activation checkpointing, and
the step of `BoosterModule` itself under Lightning: three passes, the displacement, AdamW. Prints
peak memory and seconds beside what `plan` says of the same run. bf16 needs 15 GiB (Llama-2-7B) or
17 GiB (Llama-3-8B) of free memory, nf4 6 and 8 GiB; the script refuses to start with less.
"""

import argparse
import copy
import gc
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_modules import BoosterModule
from temper.models import LoRASpec, NetworkSpec
from temper.models.blocks import checkpoint_activations
from temper.models.lora import add_lora, trainable_in_fp32
from temper.models.quantise import prepare_quantised, quantisation_settings
from temper.plan import Device, Plan, Setup, make_plan
from temper.plan.memory import measure_state_bytes
from temper.plan.shapes import find_architecture, model_shape

PATHS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3_8b": "meta-llama/Meta-Llama-3-8B"}
LORA = LoRASpec(32, 4, ["q_proj", "k_proj", "v_proj"])
BLOCK = (
    2**22
)  # random numbers that weights are filled with, over and over: drawing billions takes minutes
GIB = 2**30


class RandomBooster(BoosterModule):
    """Booster on random weights."""

    def configure_model(self) -> None:
        """Build the network here; everything else is Booster's."""
        if self.network is None:
            self.network = random_network(self.network_spec).train()


class Stopwatch(L.Callback):
    """Seconds of the training step, and peak memory over it."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.begin


def random_network(spec: NetworkSpec) -> nn.Module:
    """A network of the spec's shape, made tensor by tensor in the form in which it is kept: never
    whole in anything wider.
    """
    config = find_architecture(spec).config
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if spec.quantization:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        network.config.quantization_config = quantisation_settings(spec)["quantization_config"]
        network = replace_with_bnb_linear(network, ["lm_head"], network.config.quantization_config)
        network.is_loaded_in_4bit = True
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    quantised: dict[
        torch.Size, nn.Parameter
    ] = {}  # by shape: quantising takes a second for 16 million weights
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not hasattr(weight, "quant_type"):
                setattr(module, name, nn.Parameter(_values(weight.shape, block)))
                continue
            if weight.shape not in quantised:
                made = type(weight)(
                    _values(weight.shape, block), requires_grad=False, **weight.__dict__
                )
                quantised[weight.shape] = made.to("cpu")
            setattr(module, name, copy.deepcopy(quantised[weight.shape]))
    network.model.rotary_emb = type(network.model.rotary_emb)(
        config
    )  # its buffers were on the meta device
    if spec.quantization:
        prepare_quantised(network)
    network = trainable_in_fp32(add_lora(network, LORA))
    checkpoint_activations(network)
    return network


def _values(shape: torch.Size, block: torch.Tensor) -> torch.Tensor:
    """Random numbers; ones for norms."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    value = torch.empty(shape, dtype=torch.bfloat16)
    for part in value.view(-1).split(BLOCK):
        part.copy_(block[: part.numel()])
    return value


def batch(rows: int, tokens: int, vocabulary: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random rows of both streams; the second half is labelled."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for stream in ("alignment", "harmful"):
        ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        made[stream] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return made


def planned(spec: NetworkSpec, module: BoosterModule, rows: int, tokens: int) -> Plan:
    """What `plan` says of this run, for one device without a rate of its own."""
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
    """Highest resident memory since it was last reset, bytes."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run one step; print a row of a table."""
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
    plan = planned(spec, module, options.rows, options.tokens)
    free = psutil.virtual_memory().available
    if free < 1.08 * plan.peak.total + GIB:
        raise SystemExit(
            f"{plan.peak.total / GIB:.1f} GiB planned, and {free / GIB:.1f} GiB are free: not"
            " started"
        )
    import peft  # noqa: F401  # before memory is measured
    import transformers.integrations.bitsandbytes  # noqa: F401

    gc.collect()
    before = psutil.Process().memory_info().rss
    rows = batch(options.rows, options.tokens, model_shape(find_architecture(spec)).vocabulary)
    watch, start = Stopwatch(), time.perf_counter()
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
    peak, built = peak_rss() - before, time.perf_counter() - start - watch.seconds
    cells = [
        options.model,
        options.weights,
        f"{plan.trainable:,} of {plan.parameters:,}",
        f"{options.rows} x {options.tokens}",
        f"{peak / GIB:.2f}",
        f"{plan.peak.total / GIB:.2f}",
        f"{plan.peak.total / peak - 1:+.1%}",
        f"{watch.seconds:.0f}",
        f"{plan.work.flops / 1e12:.2f}",
        f"{plan.work.flops / watch.seconds / 1e12:.3f}",
        f"{built:.0f}",
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
