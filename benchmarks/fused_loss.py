"""Time and memory of three implementations of token log-probabilities.

    python benchmarks/fused_loss.py [--tokens 4096 --vocabulary 50304 --width 576]

Logits of every position (for losses that read logits), logits of the positions before labelled
tokens (the default of all other objectives), and no logits in memory (``fused_loss``). Memory is
the peak over that before the step, gradients included, in a process for each. Times are medians;
implementations alternate in one process.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from temper.losses import hidden_logps, labelled_logps, labelled_positions, token_logps


def labelled_only_logps(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities from logits of the positions before labelled tokens."""
    index = labelled_positions(labels)
    return labelled_logps(hidden.flatten(0, 1).index_select(0, index) @ weight.T, labels, index)


IMPLEMENTATIONS = {
    "every position": lambda hidden, weight, labels: token_logps(hidden @ weight.T, labels),
    "labelled positions": labelled_only_logps,
    "fused": hidden_logps,
}


def run_step(
    name: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean NLL and its gradient with respect to hidden states and output matrix."""
    logps, mask = IMPLEMENTATIONS[name](hidden, weight, labels)
    loss = -(logps * mask).sum() / mask.sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def make_inputs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output matrix and labels of one row; without --all half of it is a prompt."""
    torch.manual_seed(0)
    hidden = torch.randn(1, options.tokens, options.width, requires_grad=True)
    weight = (torch.randn(options.vocabulary, options.width) / options.width**0.5).requires_grad_()
    labels = torch.randint(0, options.vocabulary, (1, options.tokens))
    labels[:, : 0 if options.all else options.tokens // 2] = -100
    return hidden, weight, labels


def peak_mib() -> float:
    """Peak resident memory of this process in MiB.

    Not `ru_maxrss`, which a process inherits from its parent if the parent's was larger.
    """
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Print a table of memory and times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument(
        "--all", action="store_true", help="label every token, instead of the second half"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = make_inputs(options)
    if options.memory:
        before = peak_mib()
        run_step(options.memory, *data)
        print(peak_mib() - before)
        return
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    results = {}
    for _ in range(options.repeats):
        for name, seconds in times.items():
            start = time.perf_counter()
            results[name] = run_step(name, *data)
            seconds.append(time.perf_counter() - start)
    command = [sys.executable, *sys.argv]
    print(
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, width {options.width},"
        f" {torch.get_num_threads()} threads\n"
    )
    print("| log-probabilities | extra peak memory, MiB | seconds (median) |\n|---|---|---|")
    for name, seconds in times.items():
        done = subprocess.run(
            [*command, "--memory", name], capture_output=True, text=True, check=True
        )
        print(f"| {name} | {float(done.stdout):,.0f} | {statistics.median(seconds):.2f} |")
    loss, gradient = results["every position"]
    print()
    for name, (other_loss, other_gradient) in results.items():
        error = (gradient - other_gradient).norm() / gradient.norm()
        print(
            f"{name}: loss differs by {abs(loss - other_loss):.1e}, gradient by {error:.1e}"
            " (relative)"
        )


if __name__ == "__main__":
    main()
