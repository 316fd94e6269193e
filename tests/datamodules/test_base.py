"""Loaders of a datamodule: their streams, the share of a rank, and the first batch."""

from types import SimpleNamespace

import pytest
import torch

from datamodules import StreamDataModule, SyntheticAlignment, SyntheticInstruct
from temper.data import Batch
from temper.errors import TemperError
from temper.judges import decode_rows


class FakeObjective:
    """All that a datamodule reads of an objective."""

    def __init__(self, streams: tuple[str, ...] | None) -> None:
        self.streams = streams


def _attach(
    data: StreamDataModule, streams: tuple[str, ...] | None, rank=0, world_size=1, processed=0
) -> StreamDataModule:
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    data.trainer = SimpleNamespace(
        lightning_module=FakeObjective(streams),
        global_rank=rank,
        world_size=world_size,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return data


def _data(**arguments) -> SyntheticAlignment:
    sizes = {
        "preset": "tiny",
        "n_alignment": 24,
        "n_harmful": 8,
        "batch_size": 8,
        "harmful_batch_size": 4,
        "n_eval": 7,
        "eval_batch_size": 4,
    }
    data = SyntheticAlignment(**sizes | arguments)
    data.setup("fit")
    return data


def _epochs(data: StreamDataModule, number: int) -> list[dict[str, Batch]]:
    """Batches of so many epochs, counted as a Trainer counts them."""
    loader = data.train_dataloader()
    total = data.trainer.fit_loop.epoch_loop.batch_progress.total
    batches = []
    for _ in range(number):
        for batch, _, _ in loader:
            batches.append(batch)
            total.processed += 1
    return batches


def _ids(batches: list[dict[str, Batch]], stream: str) -> list[list[int]]:
    return [batch[stream]["ids"].tolist() for batch in batches]


def test_an_objective_without_streams_gets_the_primary_one():
    batches = _epochs(_attach(_data(), None), 1)
    assert [list(batch) for batch in batches] == [["alignment"]] * 3


@pytest.mark.parametrize("streams", [("harmful",), ("alignment", "harmful")])
def test_an_objective_gets_the_streams_it_asks_for_and_no_other(streams):
    batches = _epochs(_attach(_data(), streams), 1)
    # An epoch is one pass over the primary stream, read or not.
    assert [tuple(batch) for batch in batches] == [streams] * 3
    assert all(len(batch["harmful"]["ids"]) == 4 for batch in batches)


def test_a_missing_stream_is_refused_and_the_others_named():
    message = r"model=FakeObjective .*'retain'.*data=SyntheticAlignment .*'alignment', 'harmful'"
    with pytest.raises(TemperError, match=message):
        _attach(_data(), ("alignment", "retain")).train_dataloader()


def test_a_batch_size_that_ranks_cannot_share_is_refused():
    with pytest.raises(
        TemperError,
        match=r"stream 'alignment': batch size 8 .*3 ranks",
    ):
        _attach(_data(), None, world_size=3).train_dataloader()
    with pytest.raises(TemperError, match=r"stream 'harmful': batch size 5"):
        _attach(
            _data(harmful_batch_size=5), ("alignment", "harmful"), world_size=2
        ).train_dataloader()


def test_two_ranks_together_read_the_rows_of_one_process():
    streams = ("alignment", "harmful")
    alone = _epochs(_attach(_data(), streams), 2)
    first, second = (_epochs(_attach(_data(), streams, rank, 2), 2) for rank in (0, 1))
    for stream in streams:
        assert [
            a + b for a, b in zip(_ids(first, stream), _ids(second, stream), strict=True)
        ] == _ids(alone, stream)


def test_epochs_differ_and_every_one_visits_all_rows():
    batches = _epochs(_attach(_data(), None), 2)
    orders = [
        [i for ids in _ids(batches, "alignment")[3 * epoch : 3 * epoch + 3] for i in ids]
        for epoch in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))


@pytest.mark.parametrize("finished", [1, 3, 4])
def test_a_resumed_run_continues_after_the_last_finished_batch(finished):
    whole = _epochs(_attach(_data(), ("alignment", "harmful")), 3)
    resumed = _epochs(
        _attach(_data(), ("alignment", "harmful"), processed=finished), 3 - finished // 3
    )
    for stream in ("alignment", "harmful"):
        assert _ids(resumed, stream) == _ids(whole, stream)[finished:]


def test_workers_change_no_batch_of_any_epoch():
    alone, shared = (_epochs(_attach(_data(num_workers=n), None), 3) for n in (0, 2))
    assert len(alone) == len(shared) == 9
    for one, two in zip(alone, shared, strict=True):
        assert all(
            torch.equal(one["alignment"][name], two["alignment"][name]) for name in one["alignment"]
        )


def test_an_endless_stream_continues_from_epoch_to_epoch():
    data = SyntheticInstruct(preset="tiny", batch_size=4, epoch_batches=2, n_eval=3)
    data.setup("fit")
    batches = _epochs(_attach(data, None), 2)
    for number, batch in enumerate(batches):
        wanted = data.batch(number)["input_ids"]
        assert torch.equal(
            batch["instruct"]["input_ids"], wanted[:, : batch["instruct"]["input_ids"].shape[1]]
        )
    assert len(batches) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_evaluation_prompt_is_on_one_rank_once(world_size):
    ids = []
    for rank in range(world_size):
        data = _attach(_data(), None, rank, world_size)
        for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            batches = list(loader)
            assert len(loader) == len(batches)
        ids += [i for batch in batches for i in batch["ids"].tolist()]
    assert sorted(ids) == list(range(14))


def test_without_a_trainer_evaluation_runs_in_one_process():
    assert sum(len(batch["ids"]) for batch in _data().val_dataloader()) == 14


def test_by_default_judges_read_tokens_and_decide_correctness():
    data = _data()
    ids = torch.tensor([[0, 3, 4, 2, 0]])
    assert data.answer_texts(ids) == decode_rows(data.tokenizer, ids) and data.stop_ids is None
    assert data.prompt_texts(data.eval_rows) == decode_rows(
        data.tokenizer, data.eval_rows["input_ids"]
    )
    assert data.correct(data.eval_rows, ["a"] * 14) == [None] * 14
