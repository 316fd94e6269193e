"""Weights are counted however they are held."""

import pytest
import torch
from torch import nn

from temper.models.blocks import count_weights


def test_weights_are_counted_and_so_are_sharded_ones():
    layer = nn.Linear(3, 4)
    assert count_weights(layer.parameters()) == 16
    layer.weight.ds_numel, layer.weight.data = 12, torch.empty(0)  # as DeepSpeed leaves them
    assert count_weights(layer.parameters()) == 16


def test_4_bit_weights_count_each(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.models.networks import LORA, build, save_base

    base = save_base(tmp_path / "base")
    plain, few_bits = build(base, lora=LORA), build(base, lora=LORA, quantization="nf4")
    assert (
        count_weights(few_bits.parameters())
        == count_weights(plain.parameters())
        == sum(p.numel() for p in plain.parameters())
    )
    assert sum(p.numel() for p in few_bits.parameters()) < count_weights(few_bits.parameters())
