"""Rows are packed on request or where it helps, and never where packed sequences see each other."""

import logging
from functools import partial

import numpy as np
import pytest
import torch

from lightning_modules import AntidoteModule, BoosterModule, DPOModule, SFTModule, UnlearningModule
from temper.errors import TemperError
from temper.models import NetworkSpec
from tests.objective_cases import DATA
from tests.objectives import SHAPE, fit, make_data, make_module

MIXIN = "lightning_modules.packing"


@pytest.fixture
def packed_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every scored batch, whether its rows carried their lengths."""
    seen: list[bool] = []
    honest = SFTModule.score
    monkeypatch.setattr(
        SFTModule,
        "score",
        lambda self, rows, *a, **k: seen.append("lengths" in rows) or honest(self, rows, *a, **k),
    )
    return seen


@pytest.mark.parametrize(
    ("asked", "smallest", "packed"),
    [(True, 10**9, True), (False, 0, False), (None, 0, True), (None, 10**9, False)],
)
def test_it_is_done_if_asked_for_or_from_a_size_on(
    packed_rows, monkeypatch, asked, smallest, packed
):
    monkeypatch.setattr(f"{MIXIN}.PACKED_FROM", smallest)
    fit(make_module(SFTModule, packing=asked), make_data(), 2)
    assert packed_rows == [packed, packed]


def test_the_fill_rate_is_said(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    data = make_data()
    fit(make_module(SFTModule, packing=True), data, 1)
    (said,) = [record.message for record in caplog.records if "packed" in record.message]
    lengths = [
        data.sources["alignment"].batch(k)["attention_mask"].sum(-1).numpy() for k in range(2)
    ]  # all of a pass
    padded = sum(map(np.sum, lengths)) / sum(len(batch) * batch.max() for batch in lengths)
    start = (
        "alignment: rows are packed; share of computed tokens that are not padding:"
        f" {padded:.0%}, packed "
    )
    assert said.startswith(start) and padded < int(said[len(start) : -1]) / 100 <= 1


def test_an_objective_that_counts_row_by_row_refuses_it_by_name():
    with pytest.raises(
        TemperError,
        match="packing=true: AntidoteModule .*row by row; set it to false",
    ):
        AntidoteModule(NetworkSpec(shape=SHAPE), packing=True)
    assert AntidoteModule(NetworkSpec(shape=SHAPE)).packing.active is False


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (SFTModule, make_data),
        (BoosterModule, make_data),
        (DPOModule, DATA["preference"]),
        (partial(UnlearningModule, forget="npo"), DATA["unlearning"]),
    ],
)
def test_packed_steps_of_a_rotary_network_are_the_same(kind, data, monkeypatch):
    monkeypatch.setattr("temper.data.packing.WORTH_IT", 100)
    ends = []
    for packing in (False, True):
        rows = data()
        module = make_module(kind, rows, double=False, packing=packing)
        start = [p.detach().clone() for p in module.network.parameters()]
        fit(module, rows, 3)
        ends.append([p.detach() for p in module.network.parameters()])
    padded, packed = ends
    assert any(not torch.equal(a, b) for a, b in zip(start, padded, strict=True)), "it learns"
    assert max(float((a - b).abs().max()) for a, b in zip(padded, packed, strict=True)) < 1e-6


def test_a_network_that_mixes_sequences_is_not_packed(packed_rows, monkeypatch):
    monkeypatch.setattr(f"{MIXIN}.isolates_packed_sequences", lambda network: False)
    monkeypatch.setattr(f"{MIXIN}.PACKED_FROM", 0)
    with pytest.raises(
        TemperError,
        match=r"packing=true: packed sequences see each other in GPT2LMHeadModel \(gpt2\)",
    ):
        fit(make_module(SFTModule, packing=True), make_data(), 1)
    assert packed_rows == []
    fit(make_module(SFTModule), make_data(), 1)
    assert packed_rows == [False]
