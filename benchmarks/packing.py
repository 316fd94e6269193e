"""Time of a training step with padded and with packed rows.

    python benchmarks/packing.py [--model models/smollm2-135m-instruct] [--repeats 7]

Forward and backward pass over the same rows, padded and packed in turn, in one process; times are
medians. Row lengths are uniformly random with a fixed seed.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from temper.data.packing import fill_rate
from temper.data.rows import LENGTHS
from temper.losses import nll
from temper.models import score

# width, layers, vocabulary, rows, shortest and longest row
SHAPES = (
    (96, 3, 60, 32, 13, 25),
    (256, 4, 2048, 8, 20, 128),
    (256, 4, 2048, 32, 20, 128),
    (512, 6, 8192, 16, 20, 256),
)


def main() -> None:
    """Print a Markdown table of times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="also measure this model (12 rows of 20 to 128 tokens)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind (default: 7)")
    options = parser.parse_args()
    print(
        "| network | rows | tokens each | fill padded | fill packed | padded, ms | packed, ms |"
        " times faster | gradient differs by |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for width, layers, vocabulary, n_rows, shortest, longest in SHAPES:
        torch.manual_seed(0)
        shape = {
            "hidden_size": width,
            "intermediate_size": 8 * width // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
        }
        network = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape))
        compare(
            f"Llama, width {width}, {layers} layers",
            network,
            n_rows,
            shortest,
            longest,
            options.repeats,
        )
    if options.model:
        network = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32, local_files_only=True
        )
        compare(options.model.name, network, 12, 20, 128, options.repeats)


def compare(
    name: str, network: Any, n_rows: int, shortest: int, longest: int, repeats: int
) -> None:
    """Measure one network and print its row of the table."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (n_rows,), generator=generator)
    present = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(network.config.vocab_size, present.shape, generator=generator)
    rows = {
        "input_ids": ids,
        "attention_mask": present.long(),
        "labels": ids.masked_fill(~present, -100),
    }
    kinds = {"padded": rows, "packed": rows | {LENGTHS: lengths.numpy()}}
    gradients = {kind: compute_gradients(network, inputs) for kind, inputs in kinds.items()}
    difference = max(
        float((a - b).norm() / a.norm().clamp_min(1e-30))
        for a, b in zip(gradients["padded"], gradients["packed"], strict=True)
    )
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, inputs in kinds.items():
            started = time.perf_counter()
            compute_gradients(network, inputs)
            seconds[kind].append(time.perf_counter() - started)
    padded, packed = (1000 * median(seconds[kind]) for kind in kinds)
    fills = [fill_rate(lengths.numpy(), width) for width in (None, network.config.hidden_size)]
    cells = [
        name,
        str(n_rows),
        f"{shortest}–{longest}",
        f"{fills[0]:.2f}",
        f"{fills[1]:.2f}",
        f"{padded:.0f}",
        f"{packed:.0f}",
    ]
    print(
        "| " + " | ".join([*cells, f"{padded / packed:.2f}", f"{difference:.0e}"]) + " |",
        flush=True,
    )


def compute_gradients(network: Any, rows: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients of one forward and backward pass."""
    network.zero_grad()
    terms = nll(score(network, rows))
    (terms.total / terms.count).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


if __name__ == "__main__":
    main()
