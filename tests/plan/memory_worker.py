"""Run the command line and print the peak memory of torch's CPU allocator, in bytes.

    python tests/plan/memory_worker.py fit --config ...

Measured by torch's profiler, which records every allocation of every operator.
"""

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(profiler: profile) -> int:
    """Peak of allocated minus freed bytes in a profile."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, change in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        held += change
        peak = max(peak, held)
    return peak


def main() -> None:
    """Run the command line and print the peak."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from train import main as command_line

    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        command_line(sys.argv[1:])
    print(f"PEAK {peak_of(profiler)}")


if __name__ == "__main__":
    main()
