"""Preemption: on a signal, all ranks save a checkpoint between two steps and stop; the SLURM job is
queued again.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_modules.resume import random_state, restore_random_state
from temper.errors import TemperError
from temper.sharded_checkpoint import remove_checkpoint
from temper.slurm import next_checkpoint, preempted_checkpoints, requeue, what_next

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
# Requests of a signal; the larger one wins where ranks received different signals.
STOP = 1
REQUEUE = 2
VALIDATION_DUE = "preempted_before_validation"  # key in a checkpoint


class Preempted(SystemExit):
    """Ends a fit that a later run resumes; its code is the exit status of the process."""


class Preemption(L.Callback):
    """On a signal, save ``hpc_ckpt_<n>.ckpt`` at the end of a batch on all ranks, and stop; under
    SLURM, queue the job again.

    Signal handlers only set a flag, because Python runs them between any two lines. At the end of a
    batch the ranks all-reduce the flag (one rank alone may have received the signal), so a
    checkpoint never has perturbed weights, and no rank waits for another. If a validation is due,
    training stops before it; a single process can stop inside it as well. The whole validation then
    runs when training resumes.

    A job that SLURM starts again resumes from the checkpoint by itself; elsewhere give it as
    ``--ckpt_path``. There is never more than one: older ones are removed when the new one is
    complete, the last one when training has finished.

    Exit status: 128 + the signal's number; 75 if the job should be queued again and could not be
    from here (no ``scontrol`` in a container), so that the batch script can do it, as
    ``slurm/train.sbatch`` does.

    Args:
        requeue_on: Signals that mean "save, queue this job again, stop", such as the one that
            ``sbatch --signal`` sends before the time limit.
        stop_on: Signals that mean "save and stop", such as those that ``scancel``, a preemption
            (SLURM queues the job again itself) or ``kill`` send.
        every_n_batches: Batches between two all-reduces of several ranks; a single process checks
            its flag after every batch.

    Raises:
        TemperError: a name is no signal that can be handled, or ``every_n_batches`` is below 1.
    """

    def __init__(
        self,
        requeue_on: Sequence[str] = ("SIGUSR1",),
        stop_on: Sequence[str] = ("SIGTERM",),
        every_n_batches: int = 1,
    ) -> None:
        if every_n_batches < 1:
            raise TemperError(
                f"Preemption.every_n_batches={every_n_batches}: give a whole number >= 1"
            )
        self._meaning = {_signal("stop_on", name): STOP for name in stop_on} | {
            _signal("requeue_on", name): REQUEUE for name in requeue_on
        }
        self.every_n_batches = every_n_batches
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}  # handlers to restore
        self._before_validation: dict[str, Any] | None = None
        self._validation_due = False
        self._finished = False
        self._max_steps: int | None = None

    def _flag(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._received is None or self._meaning[received] > self._meaning[self._received]:
            self._received = received

    # -- installing signal handlers

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Handle requeue signals from now on: their default action would kill the process while it
        loads a model.
        """
        self._received = None
        self._finished = False
        self._max_steps = None
        if stage == "fit":
            self._handle(REQUEUE)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle all signals: Lightning has just installed its own SIGTERM handler, which waits for
        other ranks inside the handler.
        """
        self._handle(STOP, REQUEUE)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle all signals, and stop if one was received while the model was loaded."""
        # Lightning's own handler may have received it a moment ago.
        if trainer.received_sigterm and signal.SIGTERM in self._meaning:
            self._flag(signal.SIGTERM, None)
        self._handle(STOP, REQUEUE)
        if request := self._agreed(trainer):
            self._leave(trainer, request, save=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the checkpoints of a finished training, so that no later run in this folder
        resumes from them.
        """
        self._restore_handlers()
        if self._finished and trainer.is_global_zero:
            for old in preempted_checkpoints(trainer.default_root_dir):
                remove_checkpoint(old)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the earlier handlers; after a preemption signals stay ignored."""
        if not isinstance(exception, Preempted):
            self._restore_handlers()

    def _handle(self, *meanings: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows signal handlers in the main thread only
        for number, meaning in self._meaning.items():
            if meaning in meanings and (handler := signal.getsignal(number)) != self._flag:
                self._previous.setdefault(number, handler)
                signal.signal(number, self._flag)

    def _ignore(self, trainer: L.Trainer) -> None:
        """Ignore the signals until the process ends: srun terminates the remaining ranks when the
        first has ended, and a terminated rank has another exit status than the one that the batch
        script waits for.
        """
        if threading.current_thread() is threading.main_thread():
            restored_by_lightning = trainer._signal_connector._original_handlers
            for number in self._meaning:
                signal.signal(number, signal.SIG_IGN)
                restored_by_lightning[number] = signal.SIG_IGN

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._flag:  # else Lightning has restored its own
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    # -- acting on a signal

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save and stop, unless a validation is due first or this was the last step."""
        if trainer.world_size > 1 and (batch_idx + 1) % self.every_n_batches:
            return
        request = self._agreed(trainer)
        if not request or _validation_is_due(trainer):
            return
        if trainer.global_step != trainer.max_steps:
            self._leave(trainer, request)
        self._print(trainer, "that was the last step: finishing")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop before a validation inside a fit."""
        if self._max_steps is not None:  # see on_load_checkpoint
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._max_steps = None
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._before_validation = random_state()
            self._stop_validation(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Save and stop inside a validation in a single process; several ranks may have different
        numbers of batches, and stop after it.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            self._stop_validation(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that the last step and its evaluation are done."""
        self._finished = True

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save whether a validation must run first after resuming."""
        checkpoint[VALIDATION_DUE] = self._validation_due

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """If only the last validation is left, keep Lightning from treating the fit as finished
        until that validation has started.
        """
        if checkpoint.get(VALIDATION_DUE) and checkpoint["global_step"] == trainer.max_steps:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += 1

    def _agreed(self, trainer: L.Trainer) -> int:
        """The strongest request of any rank; 0 for none. A collective call."""
        own = 0 if self._received is None else self._meaning[self._received]
        if trainer.world_size == 1 or not self._meaning:
            return own
        request = torch.tensor(own, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        return int(request)

    def _stop_validation(self, trainer: L.Trainer) -> None:
        """If a signal was received, return to the state before the validation, save it and stop."""
        if not (request := self._agreed(trainer)):
            return
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset_on_run()
        # With these counts Lightning runs the validation again (update_restart_stage in its
        # evaluation_loop.py).
        total: Any = progress.total
        total.ready = total.completed + 1
        total.started = total.completed + 1
        total.processed = total.completed
        assert self._before_validation is not None
        restore_random_state(self._before_validation)
        self._validation_due = True
        self._leave(trainer, request)

    # -- saving and stopping

    def _leave(self, trainer: L.Trainer, request: int, save: bool = True) -> None:
        """Save, queue the job again, and stop, on all ranks.

        Raises:
            Preempted: always, with the exit status of this rank.
        """
        if self._received is not None:
            print(
                f"rank {trainer.global_rank}: received {self._received.name}",
                file=sys.stderr,
                flush=True,
            )
        old = preempted_checkpoints(trainer.default_root_dir)
        if save:
            path: Path | None = self._save(trainer)
            done = f"saved step {trainer.global_step} to {path}"
        else:
            path = old[-1] if old else None
            done = "nothing was trained since this start"
        number = self._received or next(n for n, m in self._meaning.items() if m == request)
        problem: str | None = None
        if trainer.is_global_zero:
            for checkpoint in old:
                if checkpoint != path:
                    remove_checkpoint(checkpoint)
            if request == REQUEUE:
                problem = requeue()
            self._print(trainer, f"{done}. {what_next(problem, path)}")
        # No rank ends before the job is queued again: under srun, the first rank that ends
        # terminates the others.
        number, problem = trainer.strategy.broadcast((number, problem))
        status = TRY_AGAIN if problem else 128 + number
        self._ignore(trainer)
        # A rank that rank 0 started ends with status 0: on any other Lightning would kill rank 0.
        raise Preempted(0 if _started_by_rank_zero(trainer) else status)

    def _save(self, trainer: L.Trainer) -> Path:
        """Save a checkpoint, a file or a folder, under a temporary name and rename it, so that its
        own name only ever has a complete one.
        """
        path = next_checkpoint(trainer.default_root_dir)
        partial = path.with_name("preempted.ckpt")
        if trainer.is_global_zero:
            remove_checkpoint(partial)  # left by a job that was killed while it wrote
        path, partial = trainer.strategy.broadcast((path, partial))  # after rank 0 removed it
        trainer.save_checkpoint(partial, weights_only=False)
        trainer.strategy.checkpoint_io.teardown()  # waits for saving in the background
        trainer.strategy.barrier("preemption: saved")
        if trainer.is_global_zero:
            partial.rename(path)
        return path

    def _print(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(f"preemption: {text}", file=sys.stderr, flush=True)


def _validation_is_due(trainer: L.Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _started_by_rank_zero(trainer: L.Trainer) -> bool:
    strategy: Any = trainer.strategy
    return (
        not trainer.is_global_zero
        and isinstance(strategy.launcher, _SubprocessScriptLauncher)
        and not strategy.cluster_environment.creates_processes_externally
    )


def _signal(argument: str, name: str) -> signal.Signals:
    known = {one.name for one in signal.valid_signals() if isinstance(one, signal.Signals)} - {
        "SIGKILL",
        "SIGSTOP",
    }
    if name not in known:
        raise TemperError(
            f"Preemption.{argument}: {name!r} is no signal that can be handled; give names such as"
            " SIGUSR1, SIGTERM, SIGINT"
        )
    return signal.Signals[name]
