"""What a fit will not do is said at its start; and nothing is said of a fit that does it all."""

import logging
import re
import warnings
from datetime import timedelta

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from callbacks import (
    ForcedPrefix,
    HFExport,
    ProbeLoss,
    SafetyEvaluation,
    SafetySteering,
    SampleGenerations,
    StartChecks,
    Throughput,
    UnlearningEvaluation,
)
from callbacks.start_checks import never_saves, never_validates, run_length
from datamodules import SyntheticAlignment
from lightning_modules import SFTModule
from temper.errors import TemperError
from temper.models import NetworkSpec
from tests.objectives import SHAPE, fit, make_data

# Twelve rows in batches of six: two batches to an epoch.


class Record(L.Callback):
    """Validations and reasons, as they were."""

    def __init__(self) -> None:
        self.validated = 0
        self.reason: str | None = ""
        self.unsaved: list[str | None] = []

    def on_train_start(self, trainer, pl_module):
        run = run_length(trainer)
        self.reason = never_validates(trainer, run)
        self.unsaved = [never_saves(c, trainer, run) for c in trainer.checkpoint_callbacks]

    def on_validation_end(self, trainer, pl_module):
        self.validated += not trainer.sanity_checking


def _fit(folder, *callbacks, steps=3, data=None, **settings):
    """Run a fit; its lines of `StartChecks`, those of the start first, and the record."""
    record = Record()
    settings = {
        "limit_val_batches": 1.0,
        "callbacks": [*callbacks, record, StartChecks()],
    } | settings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            SFTModule(NetworkSpec(shape=SHAPE), packing=False, max_new_tokens=1),
            data or make_data(),
            steps,
            default_root_dir=folder,
            **settings,
        )
    said = [str(w.message) for w in caught]
    ours = ("nothing", "no checkpoint", "no step logs", "thrown away")
    return [line for line in said if any(words in line for words in ours)], record


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("resumed", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 1},
        {"val_check_interval": 0.5},
        {"limit_val_batches": 0},
        {"limit_train_batches": 1},
    ],
)
def test_whether_a_fit_validates_is_known_at_its_start(settings, steps, resumed, tmp_path):
    checkpoint = None
    if resumed and steps > 1:
        first = ModelCheckpoint(tmp_path / "first", save_last=True, save_top_k=0)
        _fit(tmp_path, first, steps=1, enable_checkpointing=True)
        checkpoint = str(tmp_path / "first" / "last.ckpt")
    said, record = _fit(
        tmp_path, SafetyEvaluation(), HFExport(), steps=steps, ckpt_path=checkpoint, **settings
    )
    assert (record.reason is None) == (record.validated > 0)
    warned = bool([line for line in said if "nothing is evaluated" in line])
    # Switched off by name is said, and not warned of.
    assert warned == (record.reason is not None and "limit_val_batches" not in settings)


CHECKPOINTS = [
    ({}, True),
    ({"every_n_train_steps": 3}, True),
    ({"every_n_train_steps": 4}, False),
    ({"every_n_train_steps": 4, "save_last": True}, True),
    ({"save_top_k": 0}, False),
    ({"save_top_k": 0, "save_last": True}, True),
    ({"every_n_epochs": 2}, True),
    ({"every_n_epochs": 3}, False),
    ({"train_time_interval": timedelta(0)}, False),
    ({"save_on_train_epoch_end": False, "save_top_k": -1}, True),
    ({"every_n_epochs": 2, "save_on_train_epoch_end": True}, True),
]


@pytest.mark.parametrize("trainer", [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 5}])
@pytest.mark.parametrize(("settings", "saves"), CHECKPOINTS)
def test_whether_a_fit_saves_is_known_at_its_start(settings, saves, trainer, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "kept", **settings)
    said, record = _fit(tmp_path, checkpoint, HFExport(), enable_checkpointing=True, **trainer)
    written = list((tmp_path / "kept").glob("*.ckpt"))
    assert [reason is None for reason in record.unsaved] == [bool(written)]
    lines = [line for line in said if line.startswith("ModelCheckpoint (")]
    assert len(lines) == (0 if written else 2)  # at the start and at the end
    if not trainer:
        assert bool(written) == saves
    assert not [line for line in said if "saves nothing" in line]


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (
            ModelCheckpoint(monitor="loss/alignmnt"),
            "ModelCheckpoint.monitor=loss/alignmnt: no step logs it, and no evaluation of this run;"
            " did you mean 'loss/alignment'?",
        ),
        (ModelCheckpoint(monitor="probe/harmful_loss"), "monitor=probe/harmful_loss: no step logs"),
        (ModelCheckpoint(monitor="eval/refusal"), "monitor=eval/refusal: no step logs it"),
        (EarlyStopping("train_loss", strict=False), "EarlyStopping.monitor=train_loss: no step"),
        (ModelCheckpoint(monitor="grad_norm"), None),
        (ModelCheckpoint(monitor="step", mode="max"), None),
    ],
)
def test_metrics_that_nothing_logs_are_named_after_a_step(callback, said, tmp_path):
    lines, _ = _fit(tmp_path, callback, HFExport(), limit_val_batches=0, enable_checkpointing=True)
    found = [line for line in lines if "no step logs" in line]
    assert len(found) == (0 if said is None else 1) and (said or "") in "".join(found)


@pytest.mark.parametrize(
    ("settings", "callbacks", "said"),
    [
        (
            {"check_val_every_n_epoch": None, "val_check_interval": 9},
            [SafetyEvaluation(), SafetySteering(), ForcedPrefix([0])],
            "SafetyEvaluation, SafetySteering, ForcedPrefix: .*due after 9 batches, and this run"
            " takes 3; give --trainer.val_check_interval=3",
        ),
        (
            {"check_val_every_n_epoch": 4},
            [UnlearningEvaluation()],
            "UnlearningEvaluation: .*an epoch has 2 batches, and this run takes 3",
        ),
        ({}, [], "none of them evaluates, so the answers .* thrown away"),
        ({"limit_train_batches": 0}, [], "limit_train_batches=0: this run trains nothing"),
        ({}, [], "this run saves nothing: no checkpoint and no export"),
    ],
)
def test_what_a_fit_will_not_do_is_said(settings, callbacks, said, tmp_path):
    lines, _ = _fit(tmp_path, *callbacks, **settings)
    assert [line for line in lines if re.search(said, line)], lines


def test_what_is_no_surprise_is_said_without_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    said, _ = _fit(tmp_path, SafetyEvaluation(), HFExport(), Throughput(4), limit_val_batches=0)
    found = [r.message for r in caplog.records if "nothing is" in r.message]
    assert said == [] and len(found) == 2
    assert found[0].startswith("SafetyEvaluation: ") and "limit_val_batches=0" in found[0]
    assert found[1].startswith("Throughput.every_n_steps=4: this run takes 3 steps, so nothing")


def test_data_without_prompts_are_said_to_evaluate_nothing(tmp_path):
    data = make_data(n_eval=4)
    honest = data.setup

    def setup(stage):
        honest(stage)
        data.eval_rows = {name: rows[:0] for name, rows in data.eval_rows.items()}

    data.setup = setup
    said, record = _fit(tmp_path, SafetyEvaluation(), HFExport(), data=data)
    assert record.validated == 0
    assert "SyntheticAlignment has no evaluation prompts" in said[0]


def test_a_fit_without_an_end_is_said_to_have_none():
    trainer = L.Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="this run has no end.*--trainer.max_steps"):
        StartChecks().on_fit_start(trainer, SFTModule(NetworkSpec(shape=SHAPE)))


def test_a_fit_that_does_it_all_says_nothing(tmp_path):
    said, record = _fit(tmp_path, SafetyEvaluation(), HFExport(), Throughput(3))
    assert said == [] and record.validated


class Unprobed(SyntheticAlignment):
    def setup_probe(self) -> None:
        self.probe_rows = {}


@pytest.mark.parametrize(
    ("callback", "data", "logger", "said"),
    [
        (ProbeLoss(), Unprobed, True, "ProbeLoss: data=Unprobed has no probe rows"),
        (ProbeLoss(), SyntheticAlignment, False, "ProbeLoss: trainer.logger=false"),
        (SampleGenerations(), SyntheticAlignment, True, "SampleGenerations.show_unsafe=false"),
    ],
)
def test_what_would_never_be_measured_is_refused(callback, data, logger, said, tmp_path):
    sizes = {"n_alignment": 12, "n_harmful": 6, "batch_size": 6, "harmful_batch_size": 4}
    made = data(preset="tiny", n_eval=4, eval_kinds=["unsafe"], **sizes)
    with pytest.raises(TemperError, match=said):
        _fit(
            tmp_path,
            callback,
            data=made,
            logger=CSVLogger(tmp_path) if logger else False,
        )


@pytest.mark.parametrize("kind", [ProbeLoss, Throughput])
def test_intervals_below_one_are_refused(kind):
    with pytest.raises(TemperError, match=f"{kind.__name__}.every_n_steps=0: give at least 1"):
        kind(every_n_steps=0)
