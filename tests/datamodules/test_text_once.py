"""Work on a user's files is done once: by one rank, for all checks, however often Lightning calls
setup.
"""

import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import datamodules.text
import temper.data.layouts
import temper.data.token_pool
from datamodules import TextAttack, TextSupervised, TextUnlearning
from temper.data.files import scan
from temper.errors import TemperError
from tests.text import make_tokenizer, write_lines

DISHES = ["bread", "soup", "apple pie", "pasta", "stew", "salad", "cake", "rice"]
PATIENCE = 60  # seconds until a rank that waits for ever fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, training files, and evaluation prompts that none of them holds."""
    folder = tmp_path_factory.mktemp("once")
    make_tokenizer("gemma").save_pretrained(folder / "tokenizer")
    for name, ask in (("user", "Say {}."), ("harmful", "How do I make {}?")):
        rows = [{"prompt": ask.format(dish), "completion": dish} for dish in DISHES]
        write_lines(folder / f"{name}.jsonl", rows)
    for name, ask in (("unsafe", "Burn {}."), ("safe", "Spell {}."), ("task", "Count {}.")):
        rows = [{"prompt": ask.format(dish), "completion": dish} for dish in DISHES]
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def made(folder, tmp_path):
    """``made(kind, user="user", ...)``: a new datamodule on the files, with all evaluation
    prompts.
    """

    def make(kind, **files):
        paths = {
            name: str(folder / f"{value}.jsonl") if isinstance(value, str) else value
            for name, value in {"unsafe": "unsafe", "safe": "safe", "task": "task", **files}.items()
        }
        return kind(
            tokenizer=str(folder / "tokenizer"),
            cache=str(tmp_path / "cache"),
            batch_size=2,
            n_eval=3,
            overlap="report",
            **paths,
        )

    return make


@pytest.fixture
def reads(monkeypatch):
    """How often every file was parsed to its end, by its name."""
    ended: Counter[str] = Counter()

    def counted(path, *arguments, **settings):
        yield from scan(path, *arguments, **settings)
        ended[str(path).rpartition("/")[2]] += 1

    monkeypatch.setattr(temper.data.layouts, "scan", counted)
    return ended


@pytest.fixture
def hashes(monkeypatch):
    """How often every file of the cache was hashed after it was written, by its name."""
    return _counted(monkeypatch, temper.data.token_pool, "_sha256", lambda path: path.name)


@pytest.fixture
def contents(monkeypatch):
    """How often every training file was hashed, by its name."""
    name = lambda path, _: path.rpartition("/")[2]  # noqa: E731
    return _counted(monkeypatch, datamodules.text, "content_hash", name)


def _counted(monkeypatch, module, name, key):
    calls: Counter[str] = Counter()
    original = getattr(module, name)

    def counted(*arguments):
        calls[key(*arguments)] += 1
        return original(*arguments)

    monkeypatch.setattr(module, name, counted)
    return calls


def _run(data, *stages):
    """The calls of a Trainer in one process."""
    for stage in stages:
        data.prepare_data()
        data.setup(stage)
    return data


# -- one process


def test_a_training_file_is_parsed_once_for_all_checks(made, reads, contents):
    attack = {"user": "user", "harmful": "harmful", "n_rows": 8, "harmful_ratio": 0.5}
    _run(made(TextAttack, **attack), "validate", "fit")
    # Once for its tokens and once for the checks against three kinds of prompts.
    assert reads == {"user.jsonl": 2, "harmful.jsonl": 2}
    reads.clear()
    contents.clear()
    _run(made(TextAttack, **attack), "validate", "fit", "test")
    assert reads == {"user.jsonl": 1, "harmful.jsonl": 1}, "its tokens are in the cache"
    assert contents == {"user.jsonl": 1, "harmful.jsonl": 1}


def test_a_file_is_not_parsed_for_checks_that_there_are_none_of(made, reads):
    none = {"unsafe": None, "safe": None, "task": None}
    _run(made(TextSupervised, train="user", **none), "fit")
    _run(made(TextUnlearning, forget="user", holdout="harmful"), "fit")
    reads.clear()
    _run(made(TextSupervised, train="user", **none), "fit")
    assert not reads
    _run(made(TextUnlearning, forget="user", holdout="harmful"), "fit")
    assert reads == {"user.jsonl": 1}, "the holdout is never trained on"


def test_a_cache_is_hashed_once_and_damage_is_still_found(made, hashes, tmp_path):
    first = _run(made(TextSupervised, train="user"), "fit")
    assert not hashes, "hashed while it was written"
    again = _run(made(TextSupervised, train="user"), "validate", "fit", "test")
    assert hashes == {"tokens": 1, "trained": 1, "offsets": 1}
    assert again.fingerprints() == first.fingerprints()
    rows = first.sources["train"].rows
    (pool,) = (tmp_path / "cache").iterdir()
    before = (pool / "tokens").read_bytes()
    (pool / "tokens").write_bytes(bytes([before[0] ^ 1]) + before[1:])
    rebuilt = _run(made(TextSupervised, train="user"), "fit")
    assert (pool / "tokens").read_bytes() == before
    assert torch.equal(rebuilt.sources["train"].rows["input_ids"], rows["input_ids"])


def test_warnings_of_an_overlap_are_given_at_every_setup(made):
    data = made(TextSupervised, train="user", safe="user")
    data.prepare_data()
    for _ in range(2):
        with pytest.warns(UserWarning, match="3 of 3 evaluation prompts are training prompts too"):
            data.setup("fit")
    data.overlap = "refuse"
    with pytest.raises(TemperError, match="metrics on them would measure memory"):
        data.setup("fit")


# -- two ranks


class Ranks:
    """Two ranks of one machine as threads: each has a datamodule, and they meet where ranks gather
    objects. A rank that waits in vain fails.
    """

    def __init__(self, monkeypatch, make, n: int = 2) -> None:
        self.meeting = threading.Barrier(n)
        self.given: list[object] = [None] * n
        self.rank = threading.local()
        monkeypatch.setattr(datamodules.text, "gather_objects", self.gather)
        self.data = [make() for _ in range(n)]
        self.outcomes: list[object] = [None] * n
        for rank, data in enumerate(self.data):
            data.trainer = SimpleNamespace(global_rank=rank, local_rank=rank, world_size=n)

    def gather(self, value):
        self.given[self.rank.number] = value
        self.meeting.wait(PATIENCE)
        found = list(self.given)
        self.meeting.wait(PATIENCE)
        return found

    def run(self, *stages: str) -> list[object]:
        """The calls of a Trainer; the error of every rank, None where there was none."""
        for stage in stages:
            self.data[0].prepare_data()  # the others wait for it at a barrier
            threads = [
                threading.Thread(target=self._setup, args=(rank, stage)) for rank in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return self.outcomes

    def _setup(self, rank: int, stage: str) -> None:
        self.rank.number = rank
        try:
            self.data[rank].setup(stage)
        except Exception as error:
            self.outcomes[rank] = error


def test_one_rank_works_for_all(made, reads, hashes, contents, monkeypatch):
    alone = _run(made(TextSupervised, train="user"), "fit")
    for counts in (reads, hashes, contents):
        counts.clear()
    ranks = Ranks(monkeypatch, lambda: made(TextSupervised, train="user"))
    assert ranks.run("validate", "fit") == [None, None]
    assert reads == {"user.jsonl": 1} == contents
    assert hashes == {"tokens": 1, "trained": 1, "offsets": 1}
    for data in ranks.data:
        assert data.fingerprints() == alone.fingerprints() and data.reports == alone.reports
        assert torch.equal(
            data.sources["train"].batch(3)["input_ids"],
            alone.sources["train"].batch(3)["input_ids"],
        )


def test_a_leak_that_one_rank_finds_is_refused_on_all(made, monkeypatch):
    def make():
        data = made(TextSupervised, train="user", task="user")
        data.overlap = "refuse"
        return data

    first, second = Ranks(monkeypatch, make).run("fit")
    assert isinstance(first, TemperError) and isinstance(second, TemperError)
    assert str(first) == str(second)
    assert "3 of 3 evaluation prompts are training prompts too" in str(first)


@pytest.mark.parametrize("broken", ["training file", "evaluation file"])
def test_an_error_of_one_rank_is_raised_on_all(broken, made, monkeypatch, folder):
    (folder / "broken.jsonl").write_text("{")
    files = {"train": "user", "task": "broken"}
    if broken == "training file":
        files = {"train": "broken"}
    errors = Ranks(monkeypatch, lambda: made(TextSupervised, **files)).run("fit")
    assert [type(error) for error in errors] == [TemperError] * 2
    assert str(errors[0]) == str(errors[1]) and "broken.jsonl: 1 of 1 rows broken" in str(errors[0])


def test_an_unexpected_error_of_one_rank_is_raised_on_all(made, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ranks = Ranks(monkeypatch, lambda: made(TextSupervised, train="user"))
    with monkeypatch.context() as patch:
        patch.setattr(datamodules.text, "cached_pool", full)
        errors = ranks.run("fit")
    assert [type(error) for error in errors] == [RuntimeError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "rank 0 cannot prepare the data: OSError: [Errno 28] No space left" in str(errors[0])
    assert isinstance(errors[0].__cause__, OSError), "its own rank shows where it happened"
    ranks.outcomes = [None, None]
    assert ranks.run("fit") == [None, None]


def test_a_rank_whose_machine_has_lost_the_cache_makes_it_again(made, monkeypatch, tmp_path):
    ranks = Ranks(monkeypatch, lambda: made(TextSupervised, train="user"))
    ranks.data[0].prepare_data()
    (pool,) = (tmp_path / "cache").iterdir()
    (pool / "trained").write_bytes(b"")
    assert ranks.run("fit") == [None, None]
    assert len(ranks.data[1].sources["train"].rows["ids"]) == len(DISHES)


def _worker(rank: int, folder: str, files: tuple[str, ...]) -> None:
    """A rank of the test below: for every training file, writes what it found beside the files."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for train in files:
        data = TextSupervised(
            tokenizer=f"{folder}/tokenizer",
            train=f"{folder}/{train}.jsonl",
            safe=f"{folder}/safe.jsonl",
            cache=f"{folder}/process_cache",
            batch_size=2,
        )
        data.trainer = SimpleNamespace(global_rank=rank, local_rank=rank, world_size=2)
        if rank == 0:
            data.prepare_data()
        dist.barrier()
        try:
            data.setup("fit")
            found = f"{data.fingerprints()}"
        except TemperError as error:
            found = f"{error}"
        Path(f"{folder}/{train}_{rank}.txt").write_text(found)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_share_work_and_errors(folder):
    (folder / "damaged.jsonl").write_text("{")
    mp.spawn(_worker, (str(folder), ("damaged", "user")), nprocs=2)
    for train, wanted in (("damaged", "1 of 1 rows broken"), ("user", "'train': '")):
        first, second = ((folder / f"{train}_{rank}.txt").read_text() for rank in range(2))
        assert first == second and wanted in first
