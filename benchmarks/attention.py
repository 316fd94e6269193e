"""Attention implementations in training: python benchmarks/attention.py [--model
models/smollm2-135m-instruct] [--repeats 5].

Forward and backward pass of a LoRA adapter (fp32, rank 16 on q, k, v, o) on a bfloat16 and on a
float32 base, over rows that each hold two packed sequences, with the implementations in turn. Times
are medians; the first turn is not counted.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoTokenizer

from temper.losses import token_logps
from temper.models import LoRASpec, NetworkSpec
from temper.models.load import build_network

KINDS = ("sdpa", "eager")
SHAPES = ((9, 100), (5, 200))  # packed rows, tokens in each


def turn(network: torch.nn.Module, rows: int, tokens: int) -> tuple[float, float, float]:
    """Seconds of the forward and of the backward pass, and the norm of the gradient."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49_000, (rows, tokens), generator=generator)
    positions = torch.arange(tokens).remainder(tokens // 2).expand(rows, tokens)
    network.zero_grad()
    start = time.perf_counter()
    loss = -token_logps(
        network(input_ids=ids, position_ids=positions, use_cache=False).logits, ids
    )[0].mean()
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    return middle - start, end - middle, float(norm)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="models/smollm2-135m-instruct", help="folder of a Llama-like model"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    print(
        "| base | rows x tokens | attention | forward, s | backward, s | gradient's norm"
        " |\n|---|---|---|---|---|---|"
    )
    for dtype in ("bfloat16", "float32"):
        networks = {}
        for kind in KINDS:
            torch.manual_seed(0)  # the same adapter
            networks[kind] = build_network(
                NetworkSpec(path=options.model, dtype=dtype, attention=kind, lora=LoRASpec()),
                tokenizer,
            )
        for rows, tokens in SHAPES:
            turns = [
                {kind: turn(network, rows, tokens) for kind, network in networks.items()}
                for _ in range(options.repeats + 1)
            ][1:]
            for kind in KINDS:
                forward, backward, norm = (
                    statistics.median(values)
                    for values in zip(*(each[kind] for each in turns), strict=True)
                )
                print(
                    f"| {dtype} | {rows} x {tokens} | {kind} | {forward:.2f} | {backward:.2f} |"
                    f" {norm:.4f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
