"""Packing keeps every token and whole sequences, and is used where it saves work."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.data import packing
from temper.data.packing import fill_rate, first_fit, packing_cost, plan_packing

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(np.array)


@given(LENGTHS, st.booleans(), st.integers(0, 5))
def test_tokens_go_to_a_place_of_their_own_and_come_back(
    lengths: np.ndarray, in_one_row: bool, extra: int
):
    width = int(lengths.max()) + extra
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WORTH_IT", 1e9)
        plan = plan_packing(lengths, width, 64, in_one_row)
    assert plan is not None
    tokens_RT = torch.arange(len(lengths) * width).view(len(lengths), width) + 1
    packed_PC = tokens_RT.flatten()[plan.source_PC]
    back_RT = packed_PC.flatten()[plan.slots_RT]
    present_RT = torch.arange(width) < torch.tensor(lengths)[:, None]
    assert torch.equal(back_RT[present_RT], tokens_RT[present_RT])
    assert len(plan.slots_RT[present_RT].unique()) == lengths.sum()
    assert len(plan.source_PC) == 1 or not in_one_row
    for row, n in enumerate(lengths):  # whole, in order, in one packed row, positions from 0
        slots = plan.slots_RT[row, :n]
        assert torch.equal(slots, torch.arange(int(slots[0]), int(slots[0]) + int(n)))
        assert int(slots[0]) // plan.source_PC.shape[1] == int(slots[-1]) // plan.source_PC.shape[1]
        assert torch.equal(plan.positions_PC.flatten()[slots], torch.arange(int(n)))
        assert plan.begins_PC.flatten()[slots].tolist() == [True] + [False] * (int(n) - 1)
    padding = torch.ones(plan.source_PC.numel(), dtype=torch.bool)
    padding[plan.slots_RT[present_RT]] = False
    assert (
        plan.begins_PC.flatten()[padding].all() and not plan.positions_PC.flatten()[padding].any()
    )


@given(LENGTHS, st.integers(0, 60))
def test_first_fit_holds_every_sequence_once_within_rows(lengths: np.ndarray, extra: int):
    capacity = int(lengths.max()) + extra
    bins = first_fit(lengths, capacity)
    assert sorted(row for members in bins for row in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= capacity for members in bins)
    # No two rows could be one: what first fit promises.
    loads = sorted(int(lengths[members].sum()) for members in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(LENGTHS, st.sampled_from([16, 4096]))
def test_packing_never_costs_more_than_it_is_worth(lengths: np.ndarray, hidden_size: int):
    width = int(lengths.max())
    plan = plan_packing(lengths, width, hidden_size)
    if plan is not None:
        assert packing_cost(*plan.source_PC.shape, hidden_size) <= packing.WORTH_IT * packing_cost(
            len(lengths), width, hidden_size
        )
    assert fill_rate(lengths, hidden_size) >= fill_rate(lengths) - 1e-9


def test_equal_lengths_stay_as_they_are_and_unequal_ones_do_not():
    assert plan_packing(np.array([8, 8, 8]), 8, 64) is None
    plan = plan_packing(np.array([8, 2, 2, 2, 2]), 8, 4096)
    assert plan is not None and plan.source_PC.shape == (2, 8)
    assert (
        fill_rate(np.array([8, 2, 2, 2, 2]), 4096) == 1.0
        and fill_rate(np.array([8, 2, 2, 2, 2])) == 0.4
    )


def test_attention_over_a_long_row_is_weighed_against_padding():
    lengths = np.array([40, 25, 25, 25, 25])
    narrow = plan_packing(lengths, 40, 2)
    wide = plan_packing(lengths, 40, 4096)
    assert wide is not None and (
        narrow is None or narrow.source_PC.shape[1] < wide.source_PC.shape[1]
    )
