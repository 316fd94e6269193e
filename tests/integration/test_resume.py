"""Interrupted and resumed equals uninterrupted, bit for bit, under every strategy."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.sharded_checkpoint import ShardedCheckpoint, is_sharded
from tests.integration.strategy_runs import largest_difference, run_cases

pytestmark = pytest.mark.distributed
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SHARDED = STRATEGIES[1:]
# A held regulariser, and dropout, so that vectors and random generators matter; interrupted between
# two refreshes.
RUN: dict[str, Any] = {
    "objective": "HeldBoosterModule",
    "lora": True,
    "dropout": 0.1,
    "settings": {"refresh_every": 3},
}
WHOLE_WEIGHTS: dict[str, Any] = {
    "objective": "HeldBoosterModule",
    "optimizer": "sgd",
    "settings": {"refresh_every": 3},
}


NORMS_WITHOUT_DECAY: dict[str, Any] = {
    "objective": "SFTModule",
    "optimizer": "decaying",
    "settings": {"decay_norm_and_bias": False},
}
KINDS = {"lora": RUN, "whole": WHOLE_WEIGHTS, "groups": NORMS_WITHOUT_DECAY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def runs(folder: Path):
    cases = []
    for strategy, (kind, run) in product(STRATEGIES, KINDS.items()):
        path = str(folder / f"{strategy}-{kind}.ckpt")
        common = {"strategy": strategy, **run}
        cases += [
            {"name": f"{strategy} {kind} uninterrupted", **common, "steps": 6},
            {"name": f"{strategy} {kind} interrupted", **common, "steps": 4, "save": path},
            {"name": f"{strategy} {kind} resumed", **common, "steps": 6, "resume": path},
        ]
    # No dropout here, whose random numbers depend on the number of ranks.
    for writer, reader in (("fsdp2", "zero2"), ("zero3", "fsdp2"), ("zero1", "zero3")):
        path = str(folder / f"{writer}-whole.ckpt")
        cases.append(
            {
                "name": f"{writer} to {reader}",
                "strategy": reader,
                **WHOLE_WEIGHTS,
                "steps": 6,
                "resume": path,
            }
        )
    cases.append(
        {
            "name": "other groups",
            "strategy": "fsdp2",
            **NORMS_WITHOUT_DECAY,
            "settings": {},
            "steps": 6,
            "resume": str(folder / "fsdp2-groups.ckpt"),
        }
    )
    cases.append(
        {
            "name": "a file",
            "strategy": "fsdp2",
            **RUN,
            "steps": 6,
            "resume": str(folder / "ddp-lora.ckpt"),
        }
    )
    return run_cases(folder, cases, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(runs, strategy: str, kind: str):
    uninterrupted = runs[f"{strategy} {kind} uninterrupted"]
    assert largest_difference(runs[f"{strategy} {kind} resumed"], uninterrupted) == 0
    assert largest_difference(runs[f"{strategy} {kind} interrupted"], uninterrupted) > 1e-4


@pytest.mark.parametrize(
    ("writer", "reader"), [("fsdp2", "zero2"), ("zero3", "fsdp2"), ("zero1", "zero3")]
)
def test_one_strategy_resumes_from_anothers_checkpoint(runs, writer: str, reader: str):
    assert (
        largest_difference(runs[f"{writer} to {reader}"], runs[f"{reader} whole uninterrupted"])
        < 1e-6
    )


@pytest.mark.parametrize("strategy", SHARDED)
def test_shards_are_joined_to_whole_weights(runs, folder: Path, strategy: str):
    path = folder / f"{strategy}-whole.ckpt"
    assert is_sharded(path)
    assert {file.name for file in path.iterdir()} == {"common.pt", "part-0.pt", "part-1.pt"}
    interrupted = runs[f"{strategy} whole interrupted"]
    assert largest_difference(ShardedCheckpoint(path).weights(), interrupted) == 0


def test_other_groups_of_weights_are_refused(runs):
    assert runs["other groups"].endswith(
        "its optimizer has 2 groups of weights, and this run's 1; give"
        " model.init_args.decay_norm_and_bias as the run that wrote it had it"
    )


def test_a_file_is_refused_by_a_strategy_that_shards(runs):
    assert "a single-file checkpoint" in runs["a file"]


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("fsdp2", 1), ("zero2", 1)])
def test_another_number_of_ranks_resumes(runs, folder: Path, strategy: str, ranks: int):
    # One process under a strategy that shards still writes a sharded checkpoint, of one shard.
    path = folder / f"{strategy}-whole.ckpt"
    case = {
        "name": "resumed",
        "strategy": strategy,
        **WHOLE_WEIGHTS,
        "steps": 6,
        "resume": str(path),
        "launch": True,
    }
    alone = run_cases(folder, [case], ranks)["resumed"]
    assert isinstance(alone, dict), alone
    assert largest_difference(alone, runs[f"{strategy} whole uninterrupted"]) < 1e-6
    assert not any(
        torch.equal(alone[name], before)
        for name, before in runs[f"{strategy} whole interrupted"].items()
        if before.dim() > 1
    )
