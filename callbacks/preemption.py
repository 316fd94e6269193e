"""End a run in good order when its time is up: all ranks save between two steps, the job is queued
again, all stop.
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
from temper.slurm import next_checkpoint, preempted_checkpoints, remove, requeue, what_next

ASK_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
STOP, REQUEUE = 1, 2  # what a signal asks for; the larger wins if ranks got different ones
VALIDATION_DUE = "preempted_before_validation"  # key in a checkpoint


class Preempted(SystemExit):
    """Leaves a fit that is to be continued; its code is the exit status of the process."""


class Preemption(L.Callback):
    """On a signal, save ``hpc_ckpt_<n>.ckpt`` at the end of a batch, on all ranks together, and
    stop; under SLURM, be queued again.

    Handlers only set a flag, since Python runs them between any two lines. At the end of a batch
    the ranks agree on it in one all-reduce of a single number (one rank may have got the signal
    alone), so a checkpoint never sees displaced weights and no rank waits for another. Where a
    validation is due, training stops before it; one process alone stops inside it as well. It is
    then run as a whole when training goes on.

    A job that SLURM starts again goes on from the checkpoint by itself; elsewhere give it as
    ``--ckpt_path``. There is never more than one: older ones go when the new one is complete, the
    last one when training has finished.

    Exit status: 128 + the signal's number; 75 where the job should be queued again and could not be
    from here (no ``scontrol`` in a container), so that the batch script can do it, as
    ``slurm/train.sbatch`` does.

    Args:
        requeue_on: Signals that mean "save, queue this job again, stop": what ``sbatch --signal``
            sends before the time limit.
        stop_on: Signals that mean "save and stop": what ``scancel``, a preemption (SLURM queues the
            job again itself) or ``kill`` send.
        every_n_batches: Batches between two agreements of several ranks; a single process looks
            after every batch.
    """

    def __init__(
        self,
        requeue_on: Sequence[str] = ("SIGUSR1",),
        stop_on: Sequence[str] = ("SIGTERM",),
        every_n_batches: int = 1,
    ) -> None:
        if every_n_batches < 1:
            raise TemperError(f"every_n_batches={every_n_batches}: give a whole number >= 1")
        self._meaning = {_signal("stop_on", name): STOP for name in stop_on} | {
            _signal("requeue_on", name): REQUEUE for name in requeue_on
        }
        self.every_n_batches = every_n_batches
        self._received: signal.Signals | None = None
        self._found: dict[signal.Signals, Any] = {}  # handlers that were there before
        self._before_validation: dict[str, Any] | None = None
        self._validation_due = self._finished = False
        self._max_steps: int | None = None

    def _flag(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._received is None or self._meaning[received] > self._meaning[self._received]:
            self._received = received

    # -- when the handlers are in place

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take requeue signals from now on: their default action would kill the process while it
        loads a model.
        """
        self._received, self._finished, self._max_steps = None, False, None
        if stage == "fit":
            self._take(REQUEUE)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take all: Lightning has just put its own SIGTERM handler there, which waits for other
        ranks from inside.
        """
        self._take(STOP, REQUEUE)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take all; a signal that came while the model was loaded stops here."""
        if (
            trainer.received_sigterm and signal.SIGTERM in self._meaning
        ):  # by Lightning's own handler, a moment ago
            self._flag(signal.SIGTERM, None)
        self._take(STOP, REQUEUE)
        if wish := self._agreed(trainer):
            self._leave(trainer, wish, save=False)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training has finished: no later run in this folder is to go on from a checkpoint of
        it.
        """
        self._give_back()
        if self._finished and trainer.is_global_zero:
            remove(preempted_checkpoints(trainer.default_root_dir))

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leave the handlers as they were; on the way out of a preemption signals stay ignored."""
        if not isinstance(exception, Preempted):
            self._give_back()

    def _take(self, *meanings: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers there only
        for number, meaning in self._meaning.items():
            if meaning in meanings and (handler := signal.getsignal(number)) != self._flag:
                self._found.setdefault(number, handler)
                signal.signal(number, self._flag)

    def _ignore(self, trainer: L.Trainer) -> None:
        """From here to the end of the process: srun terminates the ranks that are left when the
        first has ended, and a rank that is terminated has another exit status than the one that the
        batch script waits for."""
        if threading.current_thread() is threading.main_thread():
            for number in self._meaning:
                signal.signal(number, signal.SIG_IGN)
                trainer._signal_connector._original_handlers[number] = (
                    signal.SIG_IGN
                )  # what Lightning puts back on its way out

    def _give_back(self) -> None:
        for number, handler in self._found.items():
            if (
                signal.getsignal(number) == self._flag
            ):  # else Lightning has put things in order already
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._found = {}

    # -- when they are acted upon

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
        if not (wish := self._agreed(trainer)) or trainer.fit_loop.epoch_loop._should_check_val_fx(
            trainer.fit_loop._data_fetcher
        ):
            return
        if trainer.global_step != trainer.max_steps:
            self._leave(trainer, wish)
        self._say(trainer, "that was the last step: finishing")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop before a validation inside a fit."""
        if self._max_steps is not None:  # see on_load_checkpoint
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._before_validation = random_state()
            self._stop_validation(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """One process alone need not wait for the end of a validation (ranks may have different
        numbers of batches).
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            self._stop_validation(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last step and its evaluation are done."""
        self._finished = True

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether a validation is to be run first."""
        checkpoint[VALIDATION_DUE] = self._validation_due

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """If only the last validation is left to do, keep Lightning from taking the whole fit for
        done, until it has begun.
        """
        if checkpoint.get(VALIDATION_DUE) and checkpoint["global_step"] == trainer.max_steps:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += 1

    def _agreed(self, trainer: L.Trainer) -> int:
        """The strongest wish of any rank; 0 for none. A collective call."""
        own = 0 if self._received is None else self._meaning[self._received]
        if trainer.world_size == 1 or not self._meaning:
            return own
        wish = torch.tensor(own, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
        return int(wish)

    def _stop_validation(self, trainer: L.Trainer) -> None:
        """If that is wished, go back to the state before the validation and save that."""
        if not (wish := self._agreed(trainer)):
            return
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        progress.reset_on_run()
        # What Lightning takes for a validation to be run again (update_restart_stage in its
        # evaluation_loop.py).
        progress.total.ready = progress.total.started = progress.total.completed + 1
        progress.total.processed = progress.total.completed
        assert self._before_validation is not None
        restore_random_state(self._before_validation)
        self._validation_due = True
        self._leave(trainer, wish)

    # -- leaving

    def _leave(self, trainer: L.Trainer, wish: int, save: bool = True) -> None:
        """Save, be queued again, stop: all ranks together."""
        if self._received is not None:
            print(
                f"rank {trainer.global_rank}: received {self._received.name}",
                file=sys.stderr,
                flush=True,
            )
        old = preempted_checkpoints(trainer.default_root_dir)
        path = self._save(trainer) if save else (old or [None])[-1]
        number, problem = (
            self._received or next(n for n, meaning in self._meaning.items() if meaning == wish),
            None,
        )
        if trainer.is_global_zero:
            remove(one for one in old if one != path)
            done = (
                f"saved step {trainer.global_step} to {path}"
                if save
                else "nothing was trained since this start"
            )
            problem = requeue() if wish == REQUEUE else None
            self._say(trainer, f"{done}. {what_next(problem, path)}")
        # Nobody leaves before the job is queued again: under srun, a rank that ends takes the
        # others with it.
        number, problem = trainer.strategy.broadcast((number, problem))
        # Ranks that rank 0 started itself end without an error, for which Lightning would kill rank
        # 0.
        child = isinstance(
            trainer.strategy.launcher, _SubprocessScriptLauncher
        ) and not _started_from_outside(trainer)
        status = ASK_AGAIN if problem else 128 + number
        self._ignore(trainer)
        raise Preempted(0 if child and not trainer.is_global_zero else status)

    def _save(self, trainer: L.Trainer) -> Path:
        """Save under another name first: under its own there is only ever a complete one, be it a
        file or a folder.
        """
        path = next_checkpoint(trainer.default_root_dir)
        partial = path.with_name("preempted.ckpt")
        if trainer.is_global_zero:
            remove([partial])  # of a job that was killed while it wrote
        path, partial = trainer.strategy.broadcast((path, partial))  # and wait for that
        trainer.save_checkpoint(partial, weights_only=False)
        trainer.strategy.checkpoint_io.teardown()  # waits for what is saved in the background
        trainer.strategy.barrier("preemption: saved")
        if trainer.is_global_zero:
            partial.rename(path)
        return path

    def _say(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(f"preemption: {text}", file=sys.stderr, flush=True)


def _started_from_outside(trainer: L.Trainer) -> bool:
    return bool(trainer.strategy.cluster_environment.creates_processes_externally)


def _signal(argument: str, name: str) -> signal.Signals:
    known = {one.name for one in signal.valid_signals() if isinstance(one, signal.Signals)} - {
        "SIGKILL",
        "SIGSTOP",
    }
    if name not in known:
        raise TemperError(
            f"{argument}: {name!r} is no signal that can be handled; give names such as SIGUSR1,"
            " SIGTERM, SIGINT"
        )
    return signal.Signals[name]
