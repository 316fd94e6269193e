"""Base of the datamodules on a user's text files: tokenizer and template, cached tokens, evaluation
prompts, and the work on files that one rank does for the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.text_evaluation import KINDS, TextEvaluation, TextFile
from temper.data import BatchSource
from temper.data.chat import ChatFormat
from temper.data.encode import Encoder, EncodeReport, Truncation, content_hash
from temper.data.files import ReadReport
from temper.data.layouts import Want, describe_layout, read_examples
from temper.data.overlap import Leaks, find_leaks
from temper.data.token_pool import Row, TokenPool, cached_pool
from temper.data.tokenizer import load_tokenizer, tokenizer_hash
from temper.errors import TemperError
from temper.judges import Judge, KeywordRefusal
from temper.ranks import gather_objects


@dataclass(frozen=True)
class Prepared:
    """Result of `TextDataModule.prepare_data`, as ranks send it to each other.

    Args:
        folders: Cache folders of the training files' rows, verified, by name of the file.
        leaks: Evaluation prompts found in the training files, by name of the file and kind of
            prompt; rank 0 alone searches.
        error: The error that ended the work.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    leaks: dict[str, dict[str, Leaks]] = field(default_factory=dict)
    error: Exception | None = None


class TextDataModule(TextEvaluation):
    """Base of datamodules on text files. Subclasses name their training files in `files`, and make
    streams of them in `streams`.

    Tokens are made once and kept in a cache folder, keyed by the files' content and everything else
    they depend on; later runs map them into memory, so files may be larger than memory. An object
    reads each file once: for files that have changed, make a new one.

    Args:
        tokenizer: Folder of the tokenizer, or a name on the hub that has been fetched; null: that
            of ``model.init_args.network.path``. One without a pad token pads with its eos token,
            which attention masks hide.
        trust_remote_code: Run code that comes with the tokenizer; null: as
            ``model.init_args.network`` says of its own, else not.
        template: ``auto`` (the tokenizer's own chat template), ``alpaca``, ``booster`` (alpaca's
            with a newline after ``### Response:``, as in the Booster paper's code), ``plain``, or a
            path to a Jinja file. The exported tokenizer has it as its chat template.
        system: System message of conversations that have none; null: none.
        thinking: For templates with a switch for it: prompt for reasoning (true), or for an answer
            without (false); null: as servers do by default.
        date: Day that is written by templates that write today's, such as 2025-01-31; null:
            2025-01-01, so that runs of different days have the same prompts.
        max_length: Most tokens in a training sequence, or in an evaluation prompt.
        truncation: How longer rows are shortened. ``drop``: they are left out. ``left``: the
            beginning of the prompt is cut, after BOS. ``right``: the end of the answer is cut. Rows
            of which no answer would be left are left out, and counted.
        all_turns: Train earlier assistant turns of a conversation too, unless the file says
            otherwise; not for pairs and marked answers, which are about the last answer alone,
            whatever the file says.
        drop_repeats: Leave out rows that are the same as an earlier one of their file; they are
            counted in either case.
        layout: Layout of the files; ``auto`` finds it out from their columns.
        eval_layout: Layout of the evaluation files, of which the prompt alone must be there; null:
            that of ``layout``.
        skip_broken: Leave rows out that cannot be read, or that the template refuses, and count
            them, in training and evaluation files alike; else they are an error.
        unsafe: File of prompts that should be refused, to evaluate on; null: none.
        safe: File of prompts that should be answered, to evaluate on; null: none.
        task: File of prompts of the user's task with the right answers, to evaluate on; null: none.
        n_eval: Prompts of each of these that are used: the first ones that are not too long.
        max_new_tokens: Longest answer at evaluation, in tokens.
        eval_batch_size: Prompts per generation batch.
        judge: Judges the answers; null: `temper.judges.KeywordRefusal`.
        overlap: If a training prompt is an evaluation prompt too, ``refuse`` to run, or ``report``
            it. Prompts that share eight words in a row are reported in either case.
        cache: Folder of the tokens.
        seed: Seed of the orders of batches, and of which rows are drawn where not all are used.
        num_workers: Loader processes; 0 makes batches in the training process.

    Attributes:
        format: Renders conversations.
        files: Training files, by name.
        reports: Counts of the rows of every file that were kept, cut and left out, by name; once
            the file has been read.
    """

    #: Names of the files that no stream reads.
    untrained: ClassVar[tuple[str, ...]] = ()
    #: Whether the last answer alone is trained, because it is compared or marked.
    one_answer: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: str | None = None,
        trust_remote_code: bool | None = None,
        template: str = "auto",
        system: str | None = None,
        thinking: bool | None = None,
        date: str | None = None,
        max_length: int = 1024,
        truncation: Truncation = "drop",
        all_turns: bool = False,
        drop_repeats: bool = False,
        layout: str = "auto",
        eval_layout: str | None = None,
        skip_broken: bool = False,
        unsafe: str | None = None,
        safe: str | None = None,
        task: str | None = None,
        n_eval: int = 200,
        max_new_tokens: int = 128,
        eval_batch_size: int = 32,
        judge: Judge | None = None,
        overlap: Literal["refuse", "report"] = "refuse",
        cache: str = "runs/token_cache",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(eval_batch_size, num_workers)
        _check_numbers(
            seed, n_eval=n_eval, max_new_tokens=max_new_tokens, eval_batch_size=eval_batch_size
        )
        self.tokenizer = load_tokenizer(tokenizer, bool(trust_remote_code))
        self.format = ChatFormat(self.tokenizer, template, system, thinking, date)
        # So that a stage that starts from the export, and every other tool, goes on with the same
        # format.
        self.tokenizer.chat_template = self.format.template
        if all_turns and self.one_answer:
            raise TemperError(
                f"data.init_args.all_turns=true: {type(self).__name__} is about one answer, the"
                " last; set it to false"
            )
        self.encoder = Encoder(
            self.format,
            max_length,
            truncation,
            None if self.one_answer else all_turns,
            drop_repeats,
            skip_broken,
        )
        self.layout = layout
        self.skip_broken = skip_broken
        self.overlap = overlap
        self.n_eval = n_eval
        self.max_new_tokens = max_new_tokens
        self.stop_ids = self.format.stop_ids
        self.judge = KeywordRefusal() if judge is None else judge
        self.cache = Path(cache)
        self.seed = seed
        self.files: dict[str, TextFile] = {}
        self.eval_files = {
            kind: self.text_file(kind, path, "prompt", eval_layout)
            for kind, path in zip(KINDS, (unsafe, safe, task), strict=True)
            if path
        }
        self.reports: dict[str, EncodeReport] = {}
        self._pools: dict[str, TokenPool] = {}
        self._prepared: Prepared | None = None

    def text_file(self, flag: str, path: str, want: Want, layout: str | None = None) -> TextFile:
        """A file of the user's, which ``data.init_args.<flag>`` names."""
        chosen = layout or self.layout
        where = f"data.init_args.{flag}"
        read = partial(read_examples, path, want, chosen, self.skip_broken, where)
        reads = f"{want} {chosen} {self.skip_broken}"
        return TextFile(
            path,
            reads,
            lambda report: read(report=report),
            lambda: str(describe_layout(path, where, chosen, want)),
        )

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """Training streams by name, the primary one first, from the rows of every file."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Do the work that one rank does for the others: tokenise the files that are not in the
        cache yet, verify those that are, and search the training files for evaluation prompts.

        Lightning calls this in one process of a machine before `setup`, and lets the others wait
        as long as it takes. It is done once, however often it is called.

        Raises:
            TemperError: a file is broken, or none of its rows fit. Where several ranks train, the
                error is kept, and `setup` raises it on all of them.
        """
        if self._prepared is not None and self._prepared.error is None:
            return
        try:
            self._prepared = self._prepare()
        except Exception as error:
            if self._ranks()[1] == 1:
                raise
            self._prepared = Prepared(error=_sendable(error, self._ranks()[0]))

    def setup(self, stage: str) -> None:
        """Read the evaluation prompts, check that no training file holds them, and map the training
        rows.

        Raises:
            TemperError: a training prompt is an evaluation prompt; a file is broken, or none of its
                rows fit; the run only evaluates, and there are no evaluation prompts.
        """
        prepared = self._share_prepared()
        self.setup_evaluation()
        if stage != "fit" and not self.eval_examples:
            raise TemperError(
                "data.init_args: there are no evaluation prompts; give a file of unsafe, safe or"
                " task prompts"
            )
        for name, leaks in prepared.leaks.items():
            self._report_leaks(name, leaks)
        for name, folder in prepared.folders.items():
            if name not in self._pools:
                self._pools[name] = self._open_verified(name, folder)
        self.sources = self.streams(self._pools)

    def pool(self, name: str) -> TokenPool:
        """The rows of a training file, from the cache or tokenised.

        Raises:
            TemperError: the file is broken, or none of its rows fit.
        """
        file = self.files[name]
        report = EncodeReport()
        seen = ReadReport()

        def rows() -> Iterator[Row]:
            yield from self.encoder.rows(file.read(seen), report)
            report.add_broken(seen)
            report.layout = file.layout()

        def about() -> dict[str, object]:
            return {"pad_id": self.tokenizer.pad_token_id, "report": report.as_dict()}

        key = {
            "content": content_hash(file.path, f"data.init_args.{name}"),
            "reads": file.reads,
            "tokenizer": tokenizer_hash(self.tokenizer),
        }
        try:
            pool = cached_pool(self.cache, key | self.encoder.settings(), rows, about)
        except TemperError as error:
            if report.read and not report.kept:
                raise TemperError(
                    f"data.init_args.{name}={file.path}: {report}; {error}: fix the rows, or give a"
                    " larger data.init_args.max_length"
                ) from error
            raise
        self._report_rows(name, pool)
        return pool

    # -- work that one rank does for the others

    def _prepare(self) -> Prepared:
        for name in self.files:
            self._pools[name] = self.pool(name)
        folders = {name: pool.folder for name, pool in self._pools.items()}
        if self._ranks()[0] != 0:  # the first process of another machine
            return Prepared(folders)
        self.setup_evaluation()
        prompts = self.examples_by_kind()
        searched = [name for name in self.files if prompts and name not in self.untrained]
        return Prepared(
            folders,
            {name: find_leaks(self.files[name].read(ReadReport()), prompts) for name in searched},
        )

    def _share_prepared(self) -> Prepared:
        """The result of `prepare_data`: folders from the first process of this machine, leaks from
        rank 0.

        Raises:
            TemperError, RuntimeError: an error of `prepare_data`, on every rank, whichever rank it
                happened on.
        """
        local_rank = self.trainer.local_rank if self.trainer else 0
        if self._prepared is None and local_rank == 0:
            self.prepare_data()
        own = self._prepared or Prepared()
        shared = gather_objects(own)
        for prepared in (own, *shared):
            if prepared.error is not None:
                raise prepared.error
        first = shared[self._ranks()[0] - local_rank] if len(shared) > 1 else own
        return Prepared(first.folders, shared[0].leaks)

    def _open_verified(self, name: str, folder: Path) -> TokenPool:
        """The rows of a training file that another process of this machine has prepared."""
        try:
            pool = TokenPool(folder, verify=False)
        except (OSError, ValueError, KeyError):
            return self.pool(name)
        self._report_rows(name, pool)
        return pool

    def _report_rows(self, name: str, pool: TokenPool) -> None:
        """Log the report of a training file's rows, and keep it."""
        if name not in self.reports:
            self.reports[name] = EncodeReport(**pool.about["report"])
            rank_zero_info(f"{name}={self.files[name].path}: {self.reports[name]}")

    def _report_leaks(self, name: str, found: dict[str, Leaks]) -> None:
        """Warn of evaluation prompts in a training file, or refuse to run."""
        for leaks in found.values():
            where = f"data.init_args.{name}={self.files[name].path}: {leaks}"
            if leaks.found.exact and self.overlap == "refuse":
                raise TemperError(
                    f"{where}; metrics on them would measure memory: take them out, or set"
                    " data.init_args.overlap=report"
                )
            if leaks.found.shared or leaks.found.exact:
                rank_zero_warn(where)

    def draw(self, flag: str, pool: TokenPool, n_rows: int, stream: int) -> np.ndarray:
        """Numbers of ``n_rows`` rows, drawn without replacement; a smaller draw with the same seed
        has the first of them.

        Args:
            flag: Name of the file, for errors.
            pool: The rows.
            n_rows: Rows to draw.
            stream: Number of the random stream; each file has one of its own.

        Raises:
            TemperError: there are not so many rows.
        """
        if n_rows > len(pool):
            raise TemperError(
                f"data.init_args.{flag}={self.files[flag].path}: {n_rows} rows are needed, and"
                f" {len(pool)} are there; give more rows, or a smaller n_rows"
            )
        return np.random.default_rng([self.seed, stream]).permutation(len(pool))[:n_rows]


def _check_numbers(seed: int, **counts: int) -> None:
    for flag, value in counts.items():
        if value < 1:
            raise TemperError(f"data.init_args.{flag}={value}: give at least 1")
    if seed < 0:
        raise TemperError(f"data.init_args.seed={seed}: give a whole number >= 0")


def _sendable(error: Exception, rank: int) -> Exception:
    """An error that can be pickled, which not every error can; its cause stays on this rank."""
    sent: Exception = (
        TemperError(str(error))
        if isinstance(error, TemperError)
        else RuntimeError(f"rank {rank} cannot prepare the data: {type(error).__name__}: {error}")
    )
    sent.__cause__ = error
    return sent
