"""Pools of rows in memory and in files: equal, rebuilt when damaged, combined."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from temper.data import PoolSource, Stream, StreamLoader, fingerprint
from temper.data import token_pool as module
from temper.data.pool import (
    JoinedPool,
    MismatchedPool,
    RowsPool,
    SequencesPool,
    Subset,
    row_numbers,
)
from temper.data.token_pool import Row, TokenPool, cached_pool, write_pool
from temper.errors import TemperError

NAMES = ("input_ids", "attention_mask", "labels")


def _rows(n_rows: int, k: int = 1, seed: int = 0, flags: bool = False) -> list[Row]:
    """Rows of 1 to 6 prompt tokens and 1 to 5 answer tokens; prompt tokens begin with the row's
    number plus 100.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_rows):
        prompt = [100 + number, *rng.integers(1, 50, rng.integers(0, 6)).tolist()]
        answers = [rng.integers(50, 99, rng.integers(1, 6)).tolist() for _ in range(k)]
        trained = [[False] * len(prompt) + [True] * len(answer) for answer in answers]
        rows.append(
            Row(
                [prompt + answer for answer in answers],
                trained,
                {"desirable": number % 3 == 0} if flags else {},
            )
        )
    return rows


def _pool(folder, rows: list[Row]) -> TokenPool:
    write_pool(folder, rows, lambda: {"pad_id": 7})
    return TokenPool(folder)


def _cached(folder, rows: list[Row], **key) -> TokenPool:
    return cached_pool(folder, key, lambda: iter(rows), lambda: {"pad_id": 7})


def _read(batch, k: int = 1) -> list[tuple[int, list[list[int]], list[list[int]]]]:
    """(number, ids, labels) of every row, padding taken off after it was checked."""
    found = []
    for i, number in enumerate(batch["ids"].tolist()):
        ids, present, labels = (batch[name][i].reshape(k, -1).tolist() for name in NAMES)
        sizes = [sum(row) for row in present]
        assert present == [
            [1] * size + [0] * (len(row) - size) for size, row in zip(sizes, present, strict=True)
        ]
        assert all(set(row[size:]) <= {-100} for row, size in zip(labels, sizes, strict=True))
        found.append(
            (
                number,
                [row[:size] for row, size in zip(ids, sizes, strict=True)],
                [row[:size] for row, size in zip(labels, sizes, strict=True)],
            )
        )
    return found


def _wanted(
    rows: list[Row], numbers: list[int]
) -> list[tuple[int, list[list[int]], list[list[int]]]]:
    label = lambda ids, trained: [i if t else -100 for i, t in zip(ids, trained, strict=True)]  # noqa: E731
    return [
        (n, rows[n].ids, [label(*pair) for pair in zip(rows[n].ids, rows[n].trained, strict=True)])
        for n in numbers
    ]


@pytest.mark.parametrize("k", [1, 2])
@given(numbers=st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_a_pool_in_files_gives_the_rows_that_were_written(k, numbers, tmp_path_factory):
    rows = _rows(9, k, flags=True)
    folder = tmp_path_factory.mktemp("pools") / "pool"
    pool = _pool(folder, rows)
    batch = pool[torch.tensor(numbers)]
    assert _read(batch, k) == _wanted(rows, numbers)
    assert (
        batch["desirable"].tolist() == [n % 3 == 0 for n in numbers]
        and batch["desirable"].dtype == torch.bool
    )
    assert batch["input_ids"].shape[-1] == max(len(ids) for n in numbers for ids in rows[n].ids), (
        "as wide as its longest row"
    )
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) <= {7}
    assert {name: batch[name].dtype for name in (*NAMES, "ids")} == dict.fromkeys(
        (*NAMES, "ids"), torch.int64
    )
    lengths = np.array([[len(ids) for ids in row.ids] for row in rows])
    assert pool.lengths.dtype == np.int32 and np.array_equal(
        pool.lengths, lengths[:, 0] if k == 1 else lengths
    )
    assert _read(pool[2:5], k) == _wanted(rows, [2, 3, 4]) and len(pool) == 9
    again = pickle.loads(pickle.dumps(pool))
    assert _read(again[torch.tensor(numbers)], k) == _read(batch, k)


def test_memory_and_files_give_the_same_batches(tmp_path):
    pool = _pool(tmp_path / "pool", _rows(11))
    in_memory = RowsPool(pool[:])
    assert np.array_equal(
        in_memory.lengths, pool.lengths
    ) and in_memory.fingerprint() == fingerprint(pool[:])
    sources = [PoolSource(p, 3, 5, "user") for p in (pool, in_memory, pool[:])]
    for number in range(7):
        read = [_read(source.batch(number)) for source in sources]
        assert read[0] == read[1] == read[2]
    assert sources[0].rows["ids"].tolist() == list(range(11))


def test_loader_processes_change_no_batch(tmp_path):
    source = PoolSource(JoinedPool(Subset(_pool(tmp_path / "a", _rows(9)))), 2, 5, "user")
    alone, shared = (list(StreamLoader(Stream(source, 4, 0, 0, 1), lambda: 0, n)) for n in (0, 2))
    assert len(alone) == len(shared) == 4
    for one, two in zip(alone, shared, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_fingerprint_is_that_of_the_rows_wherever_they_are(tmp_path):
    one = _pool(tmp_path / "a", _rows(5))
    other = _pool(tmp_path / "b", _rows(5))
    assert one.fingerprint() == other.fingerprint()
    changed = _rows(5)
    changed[3].trained[0][0] = True
    different = [
        _rows(6),
        _rows(5, seed=1),
        _rows(5, flags=True),
        changed,
        [Row(row.ids * 2, row.trained * 2) for row in _rows(5)],
    ]
    prints = {_pool(tmp_path / str(i), rows).fingerprint() for i, rows in enumerate(different)}
    assert len(prints | {one.fingerprint()}) == 6


def test_rows_are_made_once_for_a_key(tmp_path):
    pool = _cached(tmp_path / "cache", _rows(4), file="a")
    assert _cached(tmp_path / "cache", [], file="a").fingerprint() == pool.fingerprint()
    assert len(_cached(tmp_path / "cache", _rows(3), file="b")) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_files_are_hashed_only_where_they_may_be_damaged(tmp_path, monkeypatch):
    hashed: list[str] = []
    original = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path: hashed.append(path.name) or original(path))
    _cached(tmp_path, _rows(4), file="a")
    assert hashed == [], "written a moment ago"
    pool = _cached(tmp_path, [], file="a")
    assert sorted(hashed) == ["offsets", "tokens", "trained"], "written by another run"
    again = pickle.loads(pickle.dumps(pool))
    assert len(hashed) == 3, "a loader process has its pool from one that verified it"
    assert again.fingerprint() == pool.fingerprint()


@pytest.mark.parametrize("name", ["tokens", "trained", "offsets"])
def test_files_that_end_early_are_found_without_hashes(name, tmp_path):
    _pool(tmp_path / "pool", _rows(6))
    _cut(tmp_path / "pool" / name)
    with pytest.raises(ValueError):
        TokenPool(tmp_path / "pool", verify=False)


@given(
    n_rows=st.integers(0, 9),
    numbers=st.lists(st.integers(-12, 12), max_size=5),
    begin=st.none() | st.integers(-12, 12),
    end=st.none() | st.integers(-12, 12),
)
def test_row_numbers_are_those_that_numpy_gives(n_rows, numbers, begin, end):
    everything = np.arange(n_rows)
    assert row_numbers(n_rows, slice(begin, end)).tolist() == everything[begin:end].tolist()
    mask = torch.arange(n_rows) % 2 == 0
    assert row_numbers(n_rows, mask).tolist() == everything[mask.numpy()].tolist()
    index = torch.tensor(numbers, dtype=torch.long)
    try:
        wanted = everything[index.numpy()]
    except IndexError:
        with pytest.raises(IndexError, match=f"out of range for a pool of {n_rows} rows"):
            row_numbers(n_rows, index)
    else:
        found = row_numbers(n_rows, index)
        assert found.tolist() == wanted.tolist() and found.dtype == np.int64
    with pytest.raises(IndexError, match=f"a mask of {n_rows + 1} rows for a pool of {n_rows}"):
        row_numbers(n_rows, torch.ones(n_rows + 1, dtype=torch.bool))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage", [_cut, _flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()]
)
@pytest.mark.parametrize("name", ["tokens", "trained", "offsets", "desirable", "pool.json"])
def test_a_damaged_cache_is_made_anew(name, damage, tmp_path):
    rows = _rows(6, flags=True)
    _cached(tmp_path, rows, file="a")
    (folder,) = tmp_path.iterdir()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder / name)
    _cached(tmp_path, rows, file="a")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and list(
        tmp_path.iterdir()
    ) == [folder]


def test_files_of_another_version_are_made_anew(tmp_path):
    _cached(tmp_path, _rows(6), file="a")
    (folder,) = tmp_path.iterdir()
    head = json.loads((folder / "pool.json").read_text())
    (folder / "pool.json").write_text(json.dumps(head | {"version": 0}))
    assert len(_cached(tmp_path, _rows(2), file="a")) == 2


@pytest.mark.parametrize("stop", ["rows", "about", "replace"])
def test_an_interruption_leaves_nothing_behind(stop, tmp_path, monkeypatch):
    def rows():
        yield from _rows(3)
        if stop == "rows":
            raise KeyboardInterrupt

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop == "replace":
            patch.setattr(module, "replace_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_pool(
                tmp_path / "cache" / "pool", rows(), interrupted if stop == "about" else dict
            )
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_that_are_not_alike_are_refused(tmp_path):
    for other in (_rows(1, k=2), _rows(1, flags=True)):
        with pytest.raises(
            TemperError, match=r"row 4 has . answers? and the flags .*, the first row 1 and \[\]"
        ):
            write_pool(tmp_path / "pool", [*_rows(3), *other], dict)
    with pytest.raises(TemperError, match="no row is left"):
        write_pool(tmp_path / "pool", [], dict)


@given(numbers=st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_joined_pools_number_their_rows_through(numbers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pools")
    first = _rows(4)
    second = _rows(5, seed=1)
    chosen = np.array([3, 0, 4])
    joined = JoinedPool(
        Subset(_pool(folder / "a", first), flags={"unsafe": True}),
        Subset(_pool(folder / "b", second), np.array([], int), {"unsafe": True}),
        Subset(_pool(folder / "c", second), chosen, {"unsafe": False}),
    )
    rows = [*first, *(second[i] for i in chosen)]
    batch = joined[torch.tensor(numbers)]
    assert _read(batch) == _wanted(rows, numbers)
    assert batch["unsafe"].tolist() == [n < 4 for n in numbers]
    assert joined.lengths.tolist() == [len(row.ids[0]) for row in rows] and len(joined) == 7
    assert _read(joined[:]) == _wanted(rows, list(range(7)))


def test_a_joined_pool_has_a_fingerprint_of_what_it_takes(tmp_path):
    pool = _pool(tmp_path / "a", _rows(4))
    parts = [
        Subset(pool),
        Subset(pool, np.array([0, 1, 2])),
        Subset(pool, np.array([0, 2, 1])),
        Subset(pool, flags={"unsafe": True}),
    ]
    assert len({JoinedPool(part).fingerprint() for part in parts} | {pool.fingerprint()}) == 5


def test_a_mismatched_row_pairs_a_prompt_with_another_answer(tmp_path):
    rows = _rows(8, flags=True)
    pool = MismatchedPool(_pool(tmp_path / "a", rows), seed=3, max_length=9)
    split = lambda row: (
        row.ids[0][: row.trained[0].index(True)],
        row.ids[0][row.trained[0].index(True) :],
    )  # noqa: E731
    answers = [split(row)[1] for row in rows]
    used = []
    for number, ids, labels in _read(pool[:], k=2):
        prompt, own = split(rows[number])
        assert ids[0] == prompt + own and ids[1][: len(prompt)] == prompt
        other = ids[1][len(prompt) :]
        used.append(pool.other_n[number])
        assert other == answers[used[-1]][: 9 - len(prompt)] and used[-1] != number
        assert labels == [[-100] * len(prompt) + own, [-100] * len(prompt) + other]
    assert sorted(used) == list(range(8)), "every answer is used once more"
    assert max(pool.lengths[:, 1]) == 9 == pool[:]["attention_mask"][:, 1].sum(-1).max(), (
        "and some were cut"
    )
    assert pool[torch.tensor([5, 3])]["desirable"].tolist() == [False, True]
    assert pool.lengths.tolist() == pool[:]["attention_mask"].sum(-1).tolist()
    assert (
        len({MismatchedPool(pool.pool, seed, n).fingerprint() for seed in (3, 4) for n in (8, 9)})
        == 4
    )


def test_sequences_can_be_taken_alone_and_turned_round(tmp_path):
    rows = _rows(5, k=2)
    pool = _pool(tmp_path / "a", rows)
    turned = SequencesPool(pool, 1, 0)
    second = SequencesPool(pool, 1)
    assert _read(turned[1:3], 2) == _wanted(
        [Row(row.ids[::-1], row.trained[::-1]) for row in rows], [1, 2]
    )
    assert _read(second[torch.tensor([4, 0])]) == _wanted(
        [Row(row.ids[1:], row.trained[1:]) for row in rows], [4, 0]
    )
    assert (
        turned.lengths.tolist() == pool.lengths[:, ::-1].tolist()
        and second.lengths.tolist() == pool.lengths[:, 1].tolist()
    )
    assert (
        len({p.fingerprint() for p in (pool, turned, second)}) == 3
        and len(turned) == len(second) == 5
    )
