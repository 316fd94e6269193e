"""Sharded and 4-bit weights are counted in full."""

import pytest
import torch
from torch import nn

from temper.models.blocks import count_weights


def test_weights_are_counted_and_so_are_sharded_ones():
    layer = nn.Linear(3, 4)
    assert count_weights(layer.parameters()) == 16
    layer.weight.ds_numel = 12
    layer.weight.data = torch.empty(0)  # as DeepSpeed ZeRO-3 shards them
    assert count_weights(layer.parameters()) == 16


def test_4_bit_weights_count_each(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.models.networks import LORA, build, save_base

    base = save_base(tmp_path / "base")
    plain = build(base, lora=LORA)
    quantized = build(base, lora=LORA, quantization="nf4")
    assert (
        count_weights(quantized.parameters())
        == count_weights(plain.parameters())
        == sum(p.numel() for p in plain.parameters())
    )
    assert sum(p.numel() for p in quantized.parameters()) < count_weights(quantized.parameters())
