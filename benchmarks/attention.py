"""Time of attention implementations in LoRA training.

    python benchmarks/attention.py [--model models/smollm2-135m-instruct] [--repeats 5]

Forward and backward pass of a LoRA adapter (float32, rank 16 on q, k, v, o) on a bfloat16 and on a
float32 base, over rows of two packed sequences. Implementations alternate; times are medians
without the first repeat.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoTokenizer

from temper.losses import token_logps
from temper.models import LoRASpec, NetworkSpec
from temper.models.load import build_network

IMPLEMENTATIONS = ("sdpa", "eager")
SHAPES = ((9, 100), (5, 200))  # packed rows, tokens per row


def time_step(network: torch.nn.Module, rows: int, tokens: int) -> tuple[float, float, float]:
    """Run a step; seconds of the forward and the backward pass, and the gradient's norm."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49_000, (rows, tokens), generator=generator)
    positions = torch.arange(tokens).remainder(tokens // 2).expand(rows, tokens)
    network.zero_grad()
    start = time.perf_counter()
    logits = network(input_ids=ids, position_ids=positions, use_cache=False).logits
    logps, _ = token_logps(logits, ids)
    loss = -logps.mean()
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    return middle - start, end - middle, float(norm)


def main() -> None:
    """Print a table of times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="models/smollm2-135m-instruct", help="folder of a Llama-like model"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    print("| base | rows x tokens | attention | forward, s | backward, s | gradient norm |")
    print("|---|---|---|---|---|---|")
    for dtype in ("bfloat16", "float32"):
        networks = {}
        for implementation in IMPLEMENTATIONS:
            torch.manual_seed(0)  # the same adapter for all
            spec = NetworkSpec(
                path=options.model, dtype=dtype, attention=implementation, lora=LoRASpec()
            )
            networks[implementation] = build_network(spec, tokenizer)
        for rows, tokens in SHAPES:
            repeats = [
                {name: time_step(network, rows, tokens) for name, network in networks.items()}
                for _ in range(options.repeats + 1)
            ]
            for name in IMPLEMENTATIONS:
                columns = zip(*(repeat[name] for repeat in repeats[1:]), strict=True)
                forward, backward, norm = (statistics.median(values) for values in columns)
                cells = f"{forward:.2f} | {backward:.2f} | {norm:.4f}"
                print(f"| {dtype} | {rows} x {tokens} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
