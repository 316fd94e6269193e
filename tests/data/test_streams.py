"""Streams: the same batches however many ranks and workers share them, from wherever a run
resumes.
"""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from temper.data import (
    Batch,
    EvalSet,
    PoolSource,
    Stream,
    StreamLoader,
    make_rows,
    pad_left,
    pair_rows,
    select,
    trim,
)
from temper.errors import TemperError


def _pool(n_rows: int) -> Batch:
    """Rows of different lengths; the first token is the row's number plus one."""
    prompts = np.array(
        [[row + 1, *([2] * (row % 3)), *([-1] * (2 - row % 3))] for row in range(n_rows)]
    )
    responses = np.array(
        [[*([3] * (row % 5 + 1)), *([-1] * (4 - row % 5))] for row in range(n_rows)]
    )
    return make_rows(prompts, responses, 0)


def _ids(batch: Batch) -> list[int]:
    assert (batch["input_ids"][:, 0] == batch["ids"] + 1).all(), "a row's tensors stay together"
    return batch["ids"].tolist()


def _source(n_rows: int = 22, batch_size: int = 8, seed: int = 0) -> PoolSource:
    return PoolSource(_pool(n_rows), batch_size, seed, "user")


def _stream(
    source: PoolSource,
    epochs: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    epoch_batches: int = 3,
) -> list[Batch]:
    """Batches of so many epochs, the first of them begun at ``start``."""
    batches: list[Batch] = []
    for _ in range(epochs):
        batches += Stream(source, epoch_batches, start + len(batches), rank, world_size)
    return batches


class Run:
    """A loop over a loader that counts the batches it has finished, as a Trainer does."""

    def __init__(self, num_workers: int = 0, finished: int = 0) -> None:
        self.finished = finished
        self.loader = StreamLoader(
            Stream(_source(), 3, 0, 0, 1), lambda: self.finished, num_workers
        )

    def epoch(self, limit: int | None = None) -> list[Batch]:
        batches = []
        for batch in islice(self.loader, limit):
            batches.append(batch)
            self.finished += 1
        return batches


@given(n_rows=st.integers(1, 40), data=st.data())
def test_each_pass_visits_rows_once_in_full_batches(n_rows, data):
    batch_size = data.draw(st.integers(1, n_rows))
    source = _source(n_rows, batch_size, data.draw(st.integers(0, 10**6)))
    assert source.batches_per_pass == n_rows // batch_size
    for number in range(3):
        seen = [
            i
            for k in range(source.batches_per_pass)
            for i in _ids(source.batch(number * source.batches_per_pass + k))
        ]
        assert len(seen) == len(set(seen)) == source.batches_per_pass * batch_size
        assert set(seen) <= set(range(n_rows))


def test_every_pass_has_an_order_of_its_own():
    source = _source(24)
    orders = {
        tuple(i for k in range(3) for i in _ids(source.batch(3 * number + k)))
        for number in range(5)
    }
    assert len(orders) == 5


def test_over_many_passes_every_row_takes_its_turn():
    source = _source(22)
    assert {i for number in range(40) for i in _ids(source.batch(number))} == set(range(22))


@given(seed=st.integers(0, 10**6), number=st.integers(0, 10**4))
def test_a_batch_depends_on_seed_and_number_alone(seed, number):
    source = _source(seed=seed)
    first = _ids(source.batch(number))
    for other in (number + 1, 0, number + 7):
        source.batch(other)
    torch.manual_seed(seed + 1)
    torch.rand(3)
    assert _ids(source.batch(number)) == first
    assert _ids(_source(seed=seed).batch(number)) == first
    assert any(
        _ids(_source(seed=seed + 1).batch(number + k)) != _ids(source.batch(number + k))
        for k in range(3)
    )


def test_a_pass_is_permuted_once(monkeypatch):
    permuted = []
    original = torch.randperm
    monkeypatch.setattr(
        "temper.data.streams.torch.randperm",
        lambda n, **settings: permuted.append(n) or original(n, **settings),
    )
    source = _source(24, batch_size=4)
    _stream(source, 4, epoch_batches=6)
    assert permuted == [24] * 4, "four passes of six batches"
    before = source.batch(23)
    assert permuted == [24] * 4
    again = pickle.loads(pickle.dumps(source))
    assert again._order is None and _ids(again.batch(23)) == _ids(before)
    assert permuted == [24] * 5, "a loader process makes its own"


def test_drawing_batches_leaves_the_global_random_state_alone():
    source = _source()
    before = torch.random.get_rng_state()
    source.batch(5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("n_rows", "batch_size"), [(0, 1), (7, 8), (7, 0), (7, -1)])
def test_a_batch_size_that_the_pool_cannot_fill_is_refused(n_rows, batch_size):
    rows = select(_pool(8), slice(0, n_rows))
    with pytest.raises(
        TemperError, match=rf"stream 'user' has {n_rows} rows, and a batch is {batch_size}: give"
    ):
        PoolSource(rows, batch_size, 0, "user")


def test_a_fingerprint_does_not_depend_on_the_order():
    assert _source(seed=0).fingerprint() == _source(seed=1).fingerprint()
    assert _source(22).fingerprint() != _source(23).fingerprint()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_see_together_what_one_process_sees(world_size):
    alone = _stream(_source(), 3)
    shares = [_stream(_source(), 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(share) == len(alone) == 9 for share in shares)
    for whole, *parts in zip(alone, *shares, strict=True):
        assert [i for part in parts for i in _ids(part)] == _ids(whole)
        assert all(len(part["ids"]) == 8 // world_size for part in parts)
        for part in parts:
            again = trim(select(whole, torch.isin(whole["ids"], part["ids"])))
            assert all(torch.equal(part[name], again[name]) for name in part)


def test_batches_are_trimmed_to_the_longest_row_of_the_rank():
    for batch in _stream(_source(24, batch_size=4), 1, world_size=2):
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]


@given(start=st.integers(0, 20))
def test_a_resumed_stream_goes_on_where_the_first_one_was(start):
    whole = [_ids(batch) for batch in _stream(_source(), 8)]
    assert [_ids(batch) for batch in _stream(_source(), 8 - start // 3, start)] == whole[start:]


def test_a_resumed_stream_ends_its_epoch_as_the_first_run():
    assert [len(list(Stream(_source(), 3, start, 0, 1))) for start in range(7)] == [
        3,
        2,
        1,
        3,
        2,
        1,
        3,
    ]
    assert len(Stream(_source(), 3, 4, 0, 1)) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_from_epoch_to_epoch(num_workers):
    run = Run(num_workers)
    whole = [_ids(batch) for batch in _stream(_source(), 3)]
    assert [[_ids(batch) for batch in run.epoch()] for _ in range(3)] == [
        whole[:3],
        whole[3:6],
        whole[6:],
    ]


@pytest.mark.parametrize("finished", [1, 3, 5])
def test_a_loader_begins_at_the_current_step_of_the_run(finished):
    run = Run()
    whole = [_ids(batch) for batch in _stream(_source(), 3)]
    run.finished = finished
    assert [_ids(batch) for _ in range(3 - finished // 3) for batch in run.epoch()] == whole[
        finished:
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetched_but_unused_batches_are_given_again(num_workers):
    run = Run(num_workers)
    whole = [_ids(batch) for batch in _stream(_source(), 3)]
    next(iter(run.loader))
    assert [_ids(batch) for batch in run.epoch(limit=2)] == whole[:2]
    assert [_ids(batch) for batch in run.epoch()] == whole[2:3]
    assert [_ids(batch) for batch in run.epoch()] == whole[3:6]


def test_a_stream_with_fewer_rows_than_an_epoch_goes_round():
    batches = _stream(_source(8), 1, epoch_batches=5)
    assert len(batches) == 5
    assert all(sorted(_ids(batch)) == list(range(8)) for batch in batches)


@pytest.mark.parametrize("start", [0, 1])
def test_two_workers_give_the_same_batches_as_none(start):
    def epoch(num_workers: int) -> list[Batch]:
        return list(
            DataLoader(Stream(_source(), 5, start, 0, 1), batch_size=None, num_workers=num_workers)
        )

    alone = epoch(0)
    shared = epoch(2)
    assert len(alone) == len(shared) == 5 - start
    for one, two in zip(alone, shared, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


@given(
    n_rows=st.integers(3, 30), batch_size=st.integers(1, 9), world_size=st.sampled_from([1, 2, 3])
)
def test_evaluation_gives_every_row_once_over_all_ranks(n_rows, batch_size, world_size):
    sets = [EvalSet(_pool(n_rows), batch_size, rank, world_size) for rank in range(world_size)]
    batches = [list(share) for share in sets]
    assert sorted(i for share in batches for batch in share for i in _ids(batch)) == list(
        range(n_rows)
    )
    assert [len(share) for share in sets] == [len(share) for share in batches]
    # As many batches on every rank, or a collective in a forward pass would wait for ever; one row
    # more than asked keeps it so.
    assert len({len(share) for share in batches}) == 1
    assert all(1 <= len(batch["ids"]) <= batch_size + 1 for share in batches for batch in share)
    if n_rows % world_size == 0:
        assert all(len(batch["ids"]) <= batch_size for share in batches for batch in share)


def test_evaluation_with_fewer_rows_than_ranks_is_refused():
    with pytest.raises(TemperError, match=r"2 evaluation prompts for 3 ranks.*n_eval"):
        EvalSet(_pool(2), 4, 0, 3)


def test_evaluation_can_be_gone_through_again():
    rows = EvalSet(_pool(7), 3, 0, 1)
    assert (
        [_ids(batch) for batch in rows]
        == [_ids(batch) for batch in rows]
        == [[4, 2, 3], [1, 5], [6, 0]]
    )


@given(
    n_rows=st.integers(4, 40),
    batch_size=st.integers(1, 9),
    world_size=st.sampled_from([1, 2]),
    left=st.booleans(),
)
def test_evaluation_batches_are_as_wide_as_their_rows(n_rows, batch_size, world_size, left):
    pool = _pool(n_rows)
    longest = pool["attention_mask"].shape[1]
    if left:
        pool |= pad_left(pool["input_ids"], pool["attention_mask"].bool(), 0)
    for rank in range(world_size):
        lengths = [
            batch["attention_mask"].sum(1).tolist()
            for batch in EvalSet(pool, batch_size, rank, world_size)
        ]
        assert [i for batch in lengths for i in batch] == sorted(
            (i for batch in lengths for i in batch), reverse=True
        )
        for batch in EvalSet(pool, batch_size, rank, world_size):
            assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() <= longest
            rows = [
                ids[mask.bool()]
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            whole = [
                pool["input_ids"][number][pool["attention_mask"][number].bool()]
                for number in batch["ids"]
            ]
            assert all(map(torch.equal, rows, whole)), "a row keeps all its tokens"


def test_evaluation_rows_are_as_wide_as_their_longest_sequence():
    short = _pool(4)
    long = _pool(4)
    long |= {
        name: torch.cat([long[name], long[name][:, :2]], 1)
        for name in ("input_ids", "attention_mask", "labels")
    }
    pairs = pair_rows(short, long)
    (batch,) = EvalSet(pairs, 4, 0, 1)
    assert batch["input_ids"].shape == pairs["input_ids"].shape
