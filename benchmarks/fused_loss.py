"""Three ways to log-probabilities: python benchmarks/fused_loss.py [--tokens 4096 --vocabulary
50304 --width 576].

Logits of every position (for losses that read the logits), of the positions before labelled tokens
(what every other objective does), and none at all (``fused_loss``). Peak memory is that of a
process of its own for each, over what it had before (gradients are in it for all); times are
medians of interleaved runs in one process.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from temper.losses import hidden_logps, labelled_logps, labelled_positions, token_logps


def of_labelled(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the positions before labelled tokens."""
    index = labelled_positions(labels)
    return labelled_logps(hidden.flatten(0, 1).index_select(0, index) @ weight.T, labels, index)


WAYS = {
    "every position": lambda hidden, weight, labels: token_logps(hidden @ weight.T, labels),
    "labelled positions": of_labelled,
    "fused": hidden_logps,
}


def step(
    kind: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL and its gradient over hidden states and output matrix."""
    logps, mask = WAYS[kind](hidden, weight, labels)
    loss = -(logps * mask).sum() / mask.sum()
    return loss.detach(), torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, (hidden, weight))]
    )


def inputs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of tokens; half of it is a prompt, unless --all says otherwise."""
    torch.manual_seed(0)
    hidden = torch.randn(1, options.tokens, options.width, requires_grad=True)
    weight = (torch.randn(options.vocabulary, options.width) / options.width**0.5).requires_grad_()
    labels = torch.randint(0, options.vocabulary, (1, options.tokens))
    labels[:, : 0 if options.all else options.tokens // 2] = -100
    return hidden, weight, labels


def peak_mib() -> float:
    """Peak resident memory of this process (ru_maxrss would be its parent's, if that was
    larger).
    """
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument(
        "--all", action="store_true", help="label every token, instead of the second half"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = inputs(options)
    if options.memory:
        before = peak_mib()
        step(options.memory, *data)
        print(peak_mib() - before)
        return
    times: dict[str, list[float]] = {kind: [] for kind in WAYS}
    results = {}
    for _ in range(options.repeats):
        for kind, spent in times.items():
            start = time.perf_counter()
            results[kind] = step(kind, *data)
            spent.append(time.perf_counter() - start)
    command = [sys.executable, *sys.argv]
    print(
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, width {options.width},"
        f" {torch.get_num_threads()} threads\n"
    )
    print("| log-probabilities | extra peak memory, MiB | seconds (median) |\n|---|---|---|")
    for kind, spent in times.items():
        memory = float(
            subprocess.run(
                [*command, "--memory", kind], capture_output=True, text=True, check=True
            ).stdout
        )
        print(f"| {kind} | {memory:,.0f} | {statistics.median(spent):.2f} |")
    loss, gradient = results["every position"]
    for kind, (other_loss, other_gradient) in results.items():
        error = (gradient - other_gradient).norm() / gradient.norm()
        print(
            f"\n{kind}: loss differs by {abs(loss - other_loss):.1e}, gradient by {error:.1e}"
            " (relative)",
            end="",
        )
    print()


if __name__ == "__main__":
    main()
