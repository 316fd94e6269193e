"""What datamodules on a user's text files share: tokenizer and template, cached tokens, evaluation
prompts.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.text_evaluation import KINDS, TextEvaluation, TextFile
from temper.data import BatchSource
from temper.data.chat import ChatFormat, load_tokenizer, tokenizer_hash
from temper.data.encode import Encoder, EncodeReport, Truncation, content_hash
from temper.data.files import ReadReport
from temper.data.layouts import Want, describe_layout, read_examples
from temper.data.overlap import find_leaks
from temper.data.token_pool import Row, TokenPool, cached_pool
from temper.errors import TemperError
from temper.judges import Judge, KeywordRefusal


class TextDataModule(TextEvaluation):
    """Base of datamodules on text files. Subclasses name their training files in `files`, and make
    streams of them in `streams`.

    Tokens are made once and kept in a cache folder, keyed by the files' content and everything else
    they depend on; later runs map them into memory, so files may be larger than memory.

    Args:
        tokenizer: Folder of the tokenizer, or a name on the hub that has been fetched; null: that
            of ``model.init_args.network.path``. One without a pad token pads with its eos token,
            which attention masks hide.
        trust_remote_code: Run code that comes with the tokenizer; null: as
            ``model.init_args.network`` says of its own, else not.
        template: ``auto`` (the tokenizer's own chat template), ``alpaca``, ``plain``, or a path to
            a Jinja file. The exported tokenizer has it as its chat template.
        system: System message of conversations that have none; null: none.
        max_length: Most tokens in a training sequence, or in an evaluation prompt.
        truncation: What becomes of longer rows. ``drop``: they are left out. ``left``: the
            beginning of the prompt is cut, after BOS. ``right``: the end of the answer is cut. Rows
            of which no answer would be left are left out, and counted.
        all_turns: Train earlier assistant turns of a conversation too, unless the file says
            otherwise; not for pairs and marked answers, which are about the last answer alone,
            whatever the file says.
        drop_repeats: Leave out rows that are the same as an earlier one of their file; they are
            counted in either case.
        layout: Layout of the training files; ``auto`` finds it out from their columns.
        skip_broken: Leave broken rows out and count them; else they are an error.
        unsafe: File of prompts that should be refused, to evaluate on; null: none.
        safe: File of prompts that should be answered, to evaluate on; null: none.
        task: File of prompts of the user's task with the right answers, to evaluate on; null: none.
        n_eval: The first so many prompts of each of these are used, those aside that are too long.
        max_new_tokens: Longest answer at evaluation, in tokens.
        eval_batch_size: Prompts per generation batch.
        judge: Judges the answers; null: `temper.judges.KeywordRefusal`.
        overlap: What happens if a training prompt is an evaluation prompt too: ``refuse`` to run,
            or ``report`` it. Prompts that share eight words in a row are reported in either case.
        cache: Folder of the tokens.
        seed: Seed of the orders of batches, and of which rows are drawn where not all are used.
        num_workers: Loader processes; 0 makes batches in the training process.

    Attributes:
        format: Renders conversations.
        files: Training files, by name.
        reports: What became of the rows of every file, once it has been read; by name.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        trust_remote_code: bool | None = None,
        template: str = "auto",
        system: str | None = None,
        max_length: int = 1024,
        truncation: Truncation = "drop",
        all_turns: bool = False,
        drop_repeats: bool = False,
        layout: str = "auto",
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
        numbers = {
            "n_eval": n_eval,
            "max_new_tokens": max_new_tokens,
            "eval_batch_size": eval_batch_size,
        }
        for flag, value in numbers.items():
            if value < 1:
                raise TemperError(f"data.init_args.{flag}={value}: give at least 1")
        if seed < 0:
            raise TemperError(f"data.init_args.seed={seed}: give a whole number >= 0")
        self.tokenizer = load_tokenizer(tokenizer, bool(trust_remote_code))
        self.format = ChatFormat(self.tokenizer, template, system)
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
        )
        self.layout, self.skip_broken, self.overlap = layout, skip_broken, overlap
        self.n_eval, self.max_new_tokens, self.stop_ids = (
            n_eval,
            max_new_tokens,
            self.format.stop_ids,
        )
        self.judge = KeywordRefusal() if judge is None else judge
        self.cache, self.seed = Path(cache), seed
        self.files: dict[str, TextFile] = {}
        self.eval_files = {
            kind: self.text_file(kind, path, "prompt", "auto")
            for kind, path in zip(KINDS, (unsafe, safe, task), strict=True)
            if path
        }
        self.reports: dict[str, EncodeReport] = {}

    def text_file(self, flag: str, path: str, want: Want, layout: str | None = None) -> TextFile:
        """A file of the user's, which ``data.init_args.<flag>`` names."""
        chosen, where = layout or self.layout, f"data.init_args.{flag}"
        read = partial(read_examples, path, want, chosen, self.skip_broken, where)
        reads = f"{want} {chosen} {self.skip_broken}"
        return TextFile(
            path,
            reads,
            lambda report: read(report=report),
            lambda: str(describe_layout(path, where, chosen, want)),
        )

    #: Files of `files` that no stream reads.
    untrained: ClassVar[tuple[str, ...]] = ()
    #: Whether the last answer alone is trained: it is that which is compared or marked.
    one_answer: ClassVar[bool] = False

    def streams(self, pools: dict[str, TokenPool]) -> dict[str, BatchSource]:
        """Training streams by name, the primary one first, from the rows of every file."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Tokenise what is not in the cache yet; Lightning calls this in one process of a machine,
        before `setup`.
        """
        for name in self.files:
            self.pool(name)

    def setup(self, stage: str) -> None:
        """Read the evaluation prompts, check that no training file holds them, and map the training
        rows.

        Raises:
            TemperError: a training prompt is an evaluation prompt; a file is broken, or none of its
                rows fit; there is nothing to evaluate on, and that is what the run is for.
        """
        self.setup_evaluation()
        if stage != "fit" and not self.eval_examples:
            raise TemperError(
                "data.init_args: there are no evaluation prompts; give a file of unsafe, safe or"
                " task prompts"
            )
        for name, file in self.files.items():
            if name not in self.untrained:
                self._check_overlap(name, file)
        self.sources = self.streams({name: self.pool(name) for name in self.files})

    def pool(self, name: str) -> TokenPool:
        """The rows of a training file."""
        file, report, seen = self.files[name], EncodeReport(), ReadReport()

        def rows() -> Iterator[Row]:
            yield from self.encoder.rows(file.read(seen), report)
            report.broken, report.layout = seen.n_broken, file.layout()

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
                    f"data.init_args.{name}={file.path}: {report}; {error}"
                ) from error
            raise
        if name not in self.reports:
            self.reports[name] = EncodeReport(**pool.about["report"])
            rank_zero_info(f"{name}={file.path}: {self.reports[name]}")
        return pool

    def _check_overlap(self, name: str, file: TextFile) -> None:
        """Hold a training file against every kind of evaluation prompts."""
        for kind in self.eval_kinds:
            tested = [
                example
                for example, k in zip(self.eval_examples, self.kinds(self.eval_rows), strict=True)
                if k == kind
            ]
            leaks = find_leaks(file.read(ReadReport()), tested)
            where = f"data.init_args.{name}={file.path}: {leaks}"
            if leaks.found.exact and self.overlap == "refuse":
                raise TemperError(
                    f"{where}; figures on them would measure memory: take them out, or set"
                    " data.init_args.overlap=report"
                )
            if leaks.found.shared or leaks.found.exact:
                rank_zero_warn(where)

    def draw(self, flag: str, pool: TokenPool, n_rows: int, part: int) -> np.ndarray:
        """Numbers of ``n_rows`` rows, drawn without replacement; fewer rows of the same seed are
        among them.

        Raises:
            TemperError: there are not so many.
        """
        if n_rows > len(pool):
            raise TemperError(
                f"data.init_args.{flag}={self.files[flag].path}: {n_rows} rows are asked for, and"
                f" {len(pool)} are there; give more rows, or a smaller n_rows"
            )
        return np.random.default_rng([self.seed, part]).permutation(len(pool))[:n_rows]
