"""Planned shards of Llama-2-7B over eight ranks against FSDP2's, on a fake process group."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from temper.models import LoRASpec, NetworkSpec
from temper.models.blocks import decoder_layers
from temper.models.lora import add_lora
from temper.plan import Cost, Memory, Pass
from temper.plan.shapes import find_architecture
from tests.plan.memory_worker import peak_of
from tests.plan.shapes import LLAMA2, published, setup

RANKS = 8


@pytest.fixture(params=[0, RANKS - 1])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A rank of a fake process group, whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


def _sharded(path: str, lora: LoRASpec | None) -> torch.nn.Module:
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(
            find_architecture(NetworkSpec(path=path)).config, dtype=torch.bfloat16
        )
        network = add_lora(network, lora) if lora else network
    for parameter in network.parameters():
        if lora and parameter.requires_grad:
            parameter.data = parameter.data.float()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in decoder_layers(network):
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


# 12 is no multiple of 8: the last rank has less than the first.
@pytest.mark.parametrize(
    "lora",
    [None, LoRASpec(rank=32, targets=["q_proj", "k_proj", "v_proj"]), LoRASpec(rank=12)],
    ids=str,
)
def test_the_largest_shard_is_planned_to_the_byte(rank: int, lora: LoRASpec | None):
    network = _sharded(LLAMA2, lora)
    local = sum(p.to_local().numel() * p.element_size() for p in network.parameters())
    memory = Memory(
        published(),
        setup(strategy="fsdp2", devices=RANKS, dtype="bfloat16", lora=lora),
        Cost((Pass(),)),
    )
    if rank == 0:
        assert memory.local_weights == local
    else:
        assert 0 <= memory.local_weights - local < 0.003 * local, "but for padding"


def test_a_vector_of_llama_2_is_an_eighth_of_its_weights():
    memory = Memory(published(), setup(strategy="fsdp2", devices=RANKS), Cost((Pass(),)))
    assert memory.vector / 2**30 == pytest.approx(3.14, abs=0.005)


def test_ddp_holds_buckets_of_the_size_of_the_trained_weights(rank: int):
    network = torch.nn.Linear(300, 200)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        wrapped = torch.nn.parallel.DistributedDataParallel(network)
    size = sum(p.numel() * p.element_size() for p in wrapped.parameters())
    assert size <= peak_of(profiler) < 1.1 * size
    memory = Memory(published(), setup(strategy="ddp", devices=RANKS), Cost((Pass(),)))
    assert {phase.components["DDP buckets"] for phase in memory.phases} == {memory.vector}
