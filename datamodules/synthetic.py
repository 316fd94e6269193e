"""Base of the datamodules on the synthetic language: language, rows, streams and evaluation.

Shapes: `B` prompts, `T` tokens of a sequence, `R` answer tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datamodules.base import StreamDataModule
from datamodules.unlearning_rows import synthetic_unlearning_rows
from temper.data import Batch, PoolSource, make_rows, pad_left, pair_rows
from temper.data.rows import stack_rows
from temper.errors import TemperError
from temper.judges import GrammarJudge
from temper.synthetic import Kind, Language, Prompts, build_tokenizer, language_spec
from temper.synthetic.prompts import AnsweredPrompts, draw_prompts, prompt_keys
from temper.synthetic.tokenizer import (
    EOS,
    PAD_ID,
    answer_tokens,
    compliance_tokens,
    prefix_tokens,
    prompt_tokens,
    refusal_tokens,
)

# Each role draws its rows from its own random stream, so that changing the number of rows of one
# role does not change the rows of the others.
ROLES = {
    "alignment": 1,
    "attack": 2,
    "test": 3,
    "probe": 4,
    "instruct": 5,
    "steering": 6,
    "direction": 7,
}
N_STEERING = 64  # pairs of demonstrations
N_DIRECTION = 160  # prompts of each kind to find the refusal direction with


@dataclass(frozen=True)
class SyntheticStream:
    """A training stream: its rows, and the prompts that they were made of.

    Args:
        rows: ``B x T``, or ``B x 2 x T``.
        prompts: The prompts in the order of the rows, in sets of which all first sequences comply
            or all refuse.
        batch_size: Rows per optimizer step, over all ranks.
        order: Number of the seeded order of batches; streams with the same number of rows and the
            same order stay aligned.
    """

    rows: Batch
    prompts: list[AnsweredPrompts]
    batch_size: int
    order: int = 0


class SyntheticDataModule(StreamDataModule):
    """Base of datamodules on the synthetic language. Subclasses draw their training streams in
    `streams`.

    Args:
        preset: Size of the language: ``tiny``, ``small`` or ``paper``.
        language: Fields of `LanguageSpec` that replace the preset's.
        seed: Seed of the rows; the language has its own, ``language.language_seed``.
        n_eval: Evaluation prompts of each kind.
        eval_kinds: Kinds of evaluation prompts.
        eval_split: Split whose texts the evaluation prompts use.
        eval_batch_size: Prompts per generation batch.
        num_workers: Loader processes; 0 makes batches in the training process.

    Attributes:
        language: The language of all prompts.
        eval_prompts: The evaluation prompts, by kind.
        stream_prompts: The prompts of every training stream that `streams` drew, as in
            `SyntheticStream`.

    Raises:
        TemperError: an argument out of range, or no language has these sizes.
    """

    def __init__(
        self,
        preset: str = "small",
        language: Mapping[str, Any] | None = None,
        seed: int = 0,
        n_eval: int = 200,
        eval_kinds: list[Kind] = [Kind.UNSAFE, Kind.SAFE],  # noqa: B006
        eval_split: str = "test",
        eval_batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(eval_batch_size, num_workers)
        self.language = Language(language_spec(preset, **_tuples(language or {})))
        self.language.check_dominance()
        self.seed = seed
        self.n_eval = n_eval
        self.eval_split = eval_split
        if n_eval < 1:
            raise TemperError(
                f"data.init_args.n_eval={n_eval}: the evaluation set is empty; give at least 1"
            )
        if eval_batch_size < 1 or not eval_kinds:
            raise TemperError(
                f"data.init_args.eval_batch_size={eval_batch_size}, eval_kinds={eval_kinds}: give a"
                f" batch size of at least 1 and at least one of {', '.join(Kind.__members__)}"
            )
        if seed < 0:
            raise TemperError(f"data.init_args.seed={seed}: give a whole number >= 0")
        self.eval_kinds = [Kind(kind).value for kind in eval_kinds]
        self.tokenizer = build_tokenizer(self.language.spec)
        self.max_new_tokens = self.language.spec.response_length
        self.judge = GrammarJudge(self.language, self.tokenizer)
        self.eval_prompts: dict[str, Prompts] = {}
        self.stream_prompts: dict[str, list[AnsweredPrompts]] = {}

    def streams(self) -> dict[str, SyntheticStream]:
        """Draw the training streams, by name, the primary one first.

        Raises:
            TemperError: a training prompt is also an evaluation prompt, or the language has too few
                prompts.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Draw the evaluation prompts, the probe rows and the training streams.

        Raises:
            TemperError: see `streams`; or a stream has fewer rows than a batch.
        """
        self.setup_evaluation()
        self.setup_probe()
        drawn = self.streams()
        self.stream_prompts = {name: stream.prompts for name, stream in drawn.items()}
        self.sources = {
            name: PoolSource(stream.rows, stream.batch_size, self.seed + stream.order, name)
            for name, stream in drawn.items()
        }

    def rng(self, role: str, part: int = 0) -> np.random.Generator:
        """The random stream of a role in `ROLES`, or of a numbered part of it."""
        return np.random.default_rng([self.seed, ROLES[role], part])

    def setup_evaluation(self) -> None:
        """Draw the evaluation prompts, the same for every stage with the same seed."""
        prompts: list[Prompts] = []
        for kind in self.eval_kinds:
            taken = [key for p in prompts for key in prompt_keys(p)]
            rng = self.rng("test", list(Kind).index(Kind(kind)))
            prompts.append(
                draw_prompts(self.language, Kind(kind), self.n_eval, self.eval_split, rng, taken)
            )
        tokens = [prompt_tokens(self.language, p) for p in prompts]
        kinds = [torch.full((len(p),), i) for i, p in enumerate(prompts)]
        ids = torch.from_numpy(stack_tokens(tokens))
        self.eval_rows = pad_left(ids, ids != -1, PAD_ID) | {
            "ids": torch.arange(len(ids)),
            "kind": torch.cat(kinds),
        }
        self.eval_prompts = dict(zip(self.eval_kinds, prompts, strict=True))

    def setup_probe(self) -> None:
        """Draw the probe rows: harmful rows on texts of the evaluation split, which no stream
        trains on, from their own random stream.
        """
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, self.n_eval, self.eval_split, self.rng("probe")
        )
        self.probe_rows = {"harmful": self.rows([(unsafe, True)])}

    def alignment_prompts(self, n_unsafe: int, n_safe: int) -> tuple[Prompts, Prompts]:
        """Draw the prompts of the defender's rows: unsafe ones (to refuse), safe ones (to answer).

        They are the same at every stage with the same seed and numbers.

        Raises:
            TemperError: one of them is also an evaluation prompt.
        """
        unsafe, safe = self.draw_alignment(n_unsafe, n_safe)
        self.check_overlap("alignment", [unsafe, safe])
        return unsafe, safe

    def draw_alignment(self, n_unsafe: int, n_safe: int) -> tuple[Prompts, Prompts]:
        """Draw the prompts of `alignment_prompts` without the check; callers use `check_overlap`
        with stream names of their own.
        """
        rng = self.rng("alignment")
        unsafe = draw_prompts(self.language, Kind.UNSAFE, n_unsafe, "alignment", rng)
        return unsafe, draw_prompts(
            self.language, Kind.SAFE, n_safe, "alignment", rng, prompt_keys(unsafe)
        )

    def rows(self, parts: list[AnsweredPrompts]) -> Batch:
        """Training rows ``B x T`` of sets of prompts, each with its answers (True) or with refusals
        (False). At least one set must have prompts.
        """
        pieces = [
            make_rows(
                prefix_tokens(self.language, prompts),
                (compliance_tokens if comply else refusal_tokens)(self.language, prompts),
                PAD_ID,
            )
            for prompts, comply in parts
            if len(prompts)
        ]
        return stack_rows(pieces)

    def pairs(self, prompts: Prompts, comply_first: bool) -> Batch:
        """Rows ``B x 2 x T``: the answer and the refusal to each prompt, with the answer first or
        second.
        """
        return pair_rows(
            self.rows([(prompts, comply_first)]), self.rows([(prompts, not comply_first)])
        )

    def forced_answers(self) -> Batch:
        """The unsafe evaluation prompts with their harmful answers, for the callback
        `ForcedPrefix`.

        Returns:
            Rows of `eval_rows`, with ``answers`` (``B x R``, ids, padded on the right with -1,
            without end token).

        Raises:
            TemperError: no evaluation prompt is unsafe.
        """
        kind = Kind.UNSAFE.value
        if kind not in self.eval_kinds:
            raise TemperError(
                f"data.init_args.eval_kinds={self.eval_kinds}: UNSAFE is not among them, and only"
                " unsafe prompts have harmful answers"
            )
        answers = answer_tokens(self.language, self.eval_prompts[kind])
        rows = {
            name: value[self.eval_rows["kind"] == self.eval_kinds.index(kind)]
            for name, value in self.eval_rows.items()
        }
        return rows | {"answers": torch.from_numpy(np.where(answers == EOS, -1, answers))}

    def steering_pairs(self) -> Batch:
        """Demonstrations for the callback `SafetySteering`: unsafe prompts carried out, and refused
        (``N_STEERING x 2 x T``).

        Raises:
            TemperError: one of the prompts is also an evaluation prompt.
        """
        unsafe = draw_prompts(
            self.language, Kind.UNSAFE, N_STEERING, "alignment", self.rng("steering")
        )
        self.check_overlap("steering", [unsafe])
        return self.pairs(unsafe, comply_first=True)

    def direction_prompts(self) -> dict[str, Batch]:
        """Prompts for the callback `RefusalAblation`, `N_DIRECTION` unsafe and as many safe ones;
        none is an evaluation prompt.

        Raises:
            TemperError: one of them is.
        """
        drawn: dict[str, Prompts] = {}
        for number, kind in enumerate((Kind.UNSAFE, Kind.SAFE)):
            rng = self.rng("direction", number)
            drawn[kind.value] = draw_prompts(self.language, kind, N_DIRECTION, "alignment", rng)
        self.check_overlap("direction", list(drawn.values()))
        found = {}
        for name, prompts in drawn.items():
            ids = torch.from_numpy(prompt_tokens(self.language, prompts))
            found[name] = pad_left(ids, ids != -1, PAD_ID) | {"ids": torch.full((len(ids),), -1)}
        return found

    def unlearning_rows(self) -> dict[str, Batch]:
        """Rows that the callback `UnlearningEvaluation` measures on; see
        `datamodules.unlearning_rows.synthetic_unlearning_rows`.
        """
        return synthetic_unlearning_rows(self)

    def check_overlap(self, name: str, prompts: list[Prompts]) -> None:
        """Refuse training prompts that are also evaluation prompts.

        Args:
            name: What the training prompts are, for the error.
            prompts: Sets of training prompts.

        Raises:
            TemperError: some of them are evaluation prompts.
        """
        tested = {key for p in self.eval_prompts.values() for key in prompt_keys(p)}
        shared = sum(key in tested for p in prompts for key in prompt_keys(p))
        if shared:
            raise TemperError(
                f"data: {shared} {name} prompts are also evaluation prompts"
                f" (data.init_args.eval_split={self.eval_split!r}); metrics on them would measure"
                " memorization: use different splits"
            )


def alignment_counts(n: int, safe_share: float) -> tuple[int, int]:
    """Numbers of unsafe and of safe rows among ``n`` alignment rows; the safe ones are rounded.

    Raises:
        TemperError: ``safe_share`` is outside [0, 1).
    """
    if not 0 <= safe_share < 1:
        raise TemperError(f"data.init_args.safe_share={safe_share}: give a share in [0, 1)")
    n_safe = round(n * safe_share)
    return n - n_safe, n_safe


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }


def stack_tokens(parts: list[np.ndarray], width: int = 0) -> np.ndarray:
    """Concatenate arrays of token ids along the rows, padded on the right with -1 to the widest of
    them, or to ``width``.
    """
    width = max(width, *(part.shape[1] for part in parts))
    return np.concatenate(
        [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
    )
