"""What a fit will not do, said when it starts: end, train, evaluate or save."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.evaluation import EvaluationCallback
from temper.errors import did_you_mean

# Metrics under these names are logged by evaluations, which come later than the first step.
EVALUATED = ("eval/", "unlearning/", "utility/", "forced_prefix/", "refusal_ablation/")


class StartChecks(L.Callback):
    """Warn, at the start of a fit, of what it will not do although it looks as if it would.

    * A run without an end, and one that takes no step.
    * Evaluation that never happens: no evaluation prompts, an interval beyond the run's last step,
      validation switched off while callbacks wait for it.
    * Checkpoints that are never written: an interval beyond the run, ``save_top_k=0``, a time
      interval (Lightning ignores it where modules step their own optimizer, as all here do), a
      metric that nothing logs. What was written is looked at once more when the fit ends.
    * `Throughput` that never logs.

    ``python train.py fit`` always has this callback. It changes nothing.
    """

    def __init__(self) -> None:
        self._told = False
        self._validates = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for an end, and for steps at all."""
        self._told = False
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        nothing = {
            "trainer.max_steps": trainer.max_steps,
            "trainer.max_epochs": trainer.max_epochs,
            "trainer.limit_train_batches": trainer.limit_train_batches,
        }
        for flag, value in nothing.items():
            if value == 0:
                rank_zero_warn(f"{flag}=0: this run trains nothing; give at least 1")
        stops = any(isinstance(c, Timer | EarlyStopping) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.max_steps == -1 and trainer.max_epochs in (-1, None) and not stops:
            rank_zero_warn(
                "trainer.max_steps and trainer.max_epochs are not set: this run has no end, and"
                " neither evaluates nor exports at one; give --trainer.max_steps (or max_epochs)"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for evaluations and for checkpoints."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run = run_length(trainer)
        self._validates = never_validates(trainer, run) is None
        _tell_evaluation(trainer, run)
        _tell_saving(trainer, run)
        for callback in _named(trainer, "Throughput"):
            if callback.every_n_steps > run.steps:
                rank_zero_info(
                    f"Throughput.every_n_steps={callback.every_n_steps}: this run takes"
                    f" {run.steps:,.0f} steps, so nothing is logged; give a smaller number"
                )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the first step, look for monitored metrics among those that were logged."""
        if self._told:
            return
        self._told = True
        logged = [*trainer.callback_metrics, "epoch", "step"]  # Lightning adds these two
        for callback in (
            *_callbacks(trainer, ModelCheckpoint),
            *_callbacks(trainer, EarlyStopping),
        ):
            name = callback.monitor
            if name is None or name in logged or (self._validates and name.startswith(EVALUATED)):
                continue
            known = f"the first step logged {', '.join(logged)}"
            rank_zero_warn(
                f"{type(callback).__name__}.monitor={name}: no step logs it, and no evaluation of"
                f" this run; {did_you_mean(name, logged, known)}"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which checkpoint callbacks wrote nothing."""
        for callback in _callbacks(trainer, ModelCheckpoint):
            if not (callback.best_model_path or callback.last_model_path):
                rank_zero_warn(
                    "ModelCheckpoint (trainer.enable_checkpointing): this fit wrote no checkpoint"
                )


# -- the length of a run


@dataclass(frozen=True)
class RunLength:
    """What is left of a fit when it starts.

    Args:
        batches_done: Batches of earlier segments of the run.
        batches: Batches to come; inf without an end.
        per_epoch: Batches in an epoch; inf if unknown.
        first_epoch: Number of the epoch in which it starts.
    """

    batches_done: int
    batches: float
    per_epoch: float
    first_epoch: int

    @property
    def steps(self) -> float:
        """Optimizer steps to come, one for each batch."""
        return self.batches

    def epoch_sizes(self, at_most: int = 100_000) -> Iterator[tuple[int, float]]:
        """Numbers of the epochs, and the batch of each at which the run leaves it."""
        left = self.batches
        start = self.batches_done % self.per_epoch if math.isfinite(self.per_epoch) else 0
        for epoch in range(self.first_epoch, self.first_epoch + at_most):
            if left <= 0:
                return
            end = min(self.per_epoch, start + left)
            yield epoch, end
            left -= end - start
            start = 0


def run_length(trainer: L.Trainer) -> RunLength:
    """How far a fit goes, from its limits; objectives take one optimizer step for each batch."""
    per_epoch = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    batches = math.inf
    if trainer.max_steps != -1:
        batches = max(0, trainer.max_steps - trainer.global_step)
    if trainer.max_epochs not in (-1, None):
        within = done % per_epoch if math.isfinite(per_epoch) else 0
        batches = min(
            batches, max(0, (trainer.max_epochs - trainer.current_epoch) * per_epoch - within)
        )
    return RunLength(done, batches, per_epoch, trainer.current_epoch)


def never_validates(trainer: L.Trainer, run: RunLength) -> str | None:
    """Why a fit never validates, with the way out; None if it does."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches=0 switches validation off"
    if not len(getattr(data, "eval_rows", {"ids": [0]})["ids"]):
        return (
            f"data={type(data).__name__} has no evaluation prompts; give them"
            " (data.init_args.unsafe, safe or task), or evaluate the export later"
        )
    every = trainer.check_val_every_n_epoch
    interval = trainer.val_check_batch
    if interval is None:  # of time, not of batches
        return None
    if every is None:
        due = (run.batches_done // interval + 1) * interval - run.batches_done
        return (
            f"trainer.val_check_interval: the first validation is due after {due:,.0f} batches, and"
            f" this run takes {run.batches:,.0f}; give --trainer.val_check_interval="
            f"{run.batches:.0f}"
            if due > run.batches
            else None
        )
    for epoch, end in run.epoch_sizes():
        if (epoch + 1) % every == 0 and (end >= interval or end == run.per_epoch):
            return None
    return (
        f"trainer.check_val_every_n_epoch={every} and val_check_interval="
        f"{trainer.val_check_interval}: an epoch has {run.per_epoch:,.0f} batches, and this run"
        f" takes {run.batches:,.0f}; give --trainer.check_val_every_n_epoch=null"
        f" --trainer.val_check_interval={run.batches:.0f}"
    )


# -- evaluation and saving


def _tell_evaluation(trainer: L.Trainer, run: RunLength) -> None:
    waiting = [type(callback).__name__ for callback in _callbacks(trainer, EvaluationCallback)]
    reason = never_validates(trainer, run)
    if reason is not None and waiting:
        # Switched off by name, as the stages of a study do, it is no surprise.
        tell = rank_zero_info if trainer.limit_val_batches == 0 else rank_zero_warn
        tell(f"{', '.join(waiting)}: nothing is evaluated in this fit: {reason}")
    elif reason is not None and not _named(trainer, "ProbeLoss"):
        rank_zero_info(f"this fit evaluates nothing: {reason}")
    elif reason is None and not waiting:
        rank_zero_warn(
            "trainer.callbacks: none of them evaluates, so the answers generated at validation are"
            " thrown away; add SafetyEvaluation, or set trainer.limit_val_batches=0"
        )


def _tell_saving(trainer: L.Trainer, run: RunLength) -> None:
    checkpoints = _callbacks(trainer, ModelCheckpoint)
    writing = []
    for callback in checkpoints:
        reason = never_saves(callback, trainer, run)
        if reason is None:
            writing.append(callback)
        else:
            rank_zero_warn(
                f"ModelCheckpoint (trainer.enable_checkpointing): nothing is written: {reason}"
            )
    if not writing and not _named(trainer, "HFExport"):
        rank_zero_warn(
            "this run saves nothing: no checkpoint and no export; add the callback HFExport, or set"
            " trainer.enable_checkpointing=true"
        )


def never_saves(callback: ModelCheckpoint, trainer: L.Trainer, run: RunLength) -> str | None:
    """Why a checkpoint callback writes nothing in a fit; None if it does."""
    steps = callback._every_n_train_steps
    epochs = callback._every_n_epochs
    if callback.save_last:
        return None  # written when training ends, whatever the intervals
    if callback.save_top_k == 0:
        return "save_top_k=0 and save_last=false; give save_last=true"
    if callback._train_time_interval is not None and not (steps or epochs):
        return "train_time_interval is ignored by Lightning here; give every_n_train_steps"
    if steps and callback._train_time_interval is None:
        due = (trainer.global_step // steps + 1) * steps - trainer.global_step
        return (
            f"every_n_train_steps={steps}, and this run takes {run.steps:,.0f} steps; give a"
            " smaller number, or save_last=true"
            if due > run.steps
            else None
        )
    if not callback._should_save_on_train_epoch_end(trainer):
        reason = never_validates(trainer, run)
        return None if reason is None else f"it saves after a validation, and {reason}"
    if epochs and not any((epoch + 1) % epochs == 0 for epoch, _ in run.epoch_sizes()):
        return f"every_n_epochs={epochs} is more than the run's epochs; give save_last=true"
    return None


def _callbacks(trainer: L.Trainer, kind: type[Any]) -> list[Any]:
    found: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in found if isinstance(callback, kind)]


def _named(trainer: L.Trainer, name: str) -> list[Any]:
    """Callbacks of a class of this name or derived from one, which need not be imported here."""
    return [
        callback
        for callback in _callbacks(trainer, L.Callback)
        if any(kind.__name__ == name for kind in type(callback).__mro__)
    ]
