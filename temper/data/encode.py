"""Examples to rows of tokens: encoding, truncation of rows that are too long, and a report that
counts the rows kept, cut and left out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from temper.data.chat import ChatFormat, Encoded
from temper.data.examples import Example
from temper.data.files import SHOWN, ReadReport, locate
from temper.data.readers import RowError
from temper.data.token_pool import Row
from temper.errors import TemperError

T = TypeVar("T")
Truncation = Literal["drop", "left", "right"]
#: Takes a row's sequences, the most tokens and BOS; returns the shortened sequences, or None to
#: leave the row out.
Cut = Callable[[list[Encoded], int, int | None], list[Encoded] | None]


# -- truncation


def without(values: list[T], ids: list[int], excess: int, bos: int | None) -> list[T]:
    """Values of a sequence's tokens without the first ``excess``; BOS is kept and not counted."""
    kept = int(ids[0] == bos)
    return values[:kept] + values[kept + excess :]


def _left(sequences: list[Encoded], max_length: int, bos: int | None) -> list[Encoded] | None:
    excess = max(len(sequence.ids) for sequence in sequences) - max_length
    for s in sequences:
        answer = next(
            (n for n, trained in enumerate(reversed(s.trained)) if not trained), len(s.ids)
        )
        # A token must be left to predict the answer's first token.
        if len(s.ids) - answer - excess < 1:
            return None
    return [
        Encoded(without(s.ids, s.ids, excess, bos), without(s.trained, s.ids, excess, bos), s.notes)
        for s in sequences
    ]


def _right(sequences: list[Encoded], max_length: int, bos: int | None) -> list[Encoded] | None:
    return [Encoded(s.ids[:max_length], s.trained[:max_length], s.notes) for s in sequences]


CUTS: dict[str, Cut] = {
    "drop": lambda sequences, max_length, bos: None,
    "left": _left,
    "right": _right,
}


# -- the report and the encoder

TRANSFORMERS = version("transformers")  # renders templates
# Version of how examples, prompts of tasks and chat formats become tokens: raise it with every
# change, and caches are made anew.
ENCODING = 4


@dataclass
class EncodeReport:
    """Counts of the rows of a file that were kept, cut and left out.

    Args:
        read: Rows that could be read.
        broken: Rows that could not be read, and were skipped (``skip_broken``).
        kept: Rows that are used.
        cut: Rows among them that were shortened to the greatest length.
        dropped: Rows left out because they are too long.
        unanswered: Rows left out because cutting them to that length would leave nothing of an
            answer.
        refused: Rows left out because the template does not take their turns, or the tokenizer
            cannot write them (``skip_broken``).
        equal: Rows of two answers left out because these are the same, token for token, from the
            start or once they are cut.
        repeats: Rows kept that are the same as an earlier one, token for token.
        repeats_dropped: Such rows left out (``drop_repeats``).
        sequences: Sequences in the rows kept: two in a pair.
        tokens: Tokens in them.
        trained: Tokens with a label among those.
        longest: Tokens of the longest.
        desirable: Rows kept whose answer is marked desirable (KTO).
        undesirable: Rows kept whose answer is marked undesirable.
        reasons: The first different reasons for which rows were skipped, with a row of each.
        stripped: Rows kept whose turns lost white space at their ends to the template.
        reasoning_dropped: Rows kept whose earlier turns lost their reasoning to the template.
        last_only: Rows kept of which earlier turns were to be trained too and are not, since the
            template writes them otherwise than the model does.
        reasoning_added: Rows kept whose answer has no reasoning, and which train an empty block of
            it, as the template or its prompt has it.
        layout: The layout of the file, in words.
        format: Choices that prompts depend on, in words: see `ChatFormat.facts`.
    """

    read: int = 0
    broken: int = 0
    kept: int = 0
    cut: int = 0
    dropped: int = 0
    unanswered: int = 0
    refused: int = 0
    equal: int = 0
    repeats: int = 0
    repeats_dropped: int = 0
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    desirable: int = 0
    undesirable: int = 0
    reasons: list[str] = field(default_factory=list)
    stripped: int = 0
    reasoning_dropped: int = 0
    last_only: int = 0
    reasoning_added: int = 0
    layout: str = ""
    format: str = ""

    @property
    def fill(self) -> float:
        """Share of tokens if every sequence were padded to the longest."""
        return self.tokens / max(1, self.sequences * self.longest)

    def count(self, sequences: list[Encoded]) -> None:
        """Add a row that is kept."""
        self.kept += 1
        self.sequences += len(sequences)
        self.tokens += sum(len(sequence.ids) for sequence in sequences)
        self.trained += sum(sum(sequence.trained) for sequence in sequences)
        self.longest = max(self.longest, *(len(sequence.ids) for sequence in sequences))
        for note in {note for sequence in sequences for note in sequence.notes}:
            setattr(self, note, getattr(self, note) + 1)

    def refuse(self, example: Example, reason: str) -> None:
        """Add a row that cannot be encoded."""
        self.refused += 1
        if len(self.reasons) < SHOWN and not any(known.endswith(reason) for known in self.reasons):
            self.reasons.append(f"row {example.row}: {reason}")

    def add_broken(self, seen: ReadReport) -> None:
        """Add the rows that could not be read."""
        self.broken = seen.n_broken
        self.reasons = [*map(str, seen.problems), *self.reasons][:SHOWN]

    def __str__(self) -> str:
        left_out = {
            "too long": self.dropped,
            "nothing of the answer left": self.unanswered,
            "both answers the same": self.equal,
            "broken": self.broken,
            "refused by the template": self.refused,
            "the same as an earlier one": self.repeats_dropped,
        }
        counts = [f"{n:,} left out ({why})" for why, n in left_out.items() if n]
        if self.repeats:
            counts.append(f"{self.repeats:,} the same as an earlier one")
        changes = {
            "without white space at the ends of turns": self.stripped,
            "without the reasoning of earlier turns, which the template drops": (
                self.reasoning_dropped
            ),
            "with the last turn alone trained, since the template writes earlier ones otherwise": (
                self.last_only
            ),
            "with an empty block of reasoning trained": self.reasoning_added,
        }
        counts += [f"{n:,} {how}" for how, n in changes.items() if n]
        cut = f" ({self.cut:,} of them cut)" if self.cut else ""
        rows = (
            f"{self.kept:,} of {self.read + self.broken:,}"
            f" rows{cut}{''.join(f', {count}' for count in counts)}"
        )
        trained = f"{self.trained:,} of them trained, " if self.trained else ""  # of prompts, none
        tokens = f"{self.tokens:,} tokens, {trained}longest {self.longest:,}, fill {self.fill:.0%}"
        marks = (
            f"{self.desirable:,} desirable, {self.undesirable:,} undesirable"
            if self.desirable or self.undesirable
            else ""
        )
        parts = [rows, tokens if self.kept else "", marks, *self.reasons, self.format, self.layout]
        return "; ".join(filter(None, parts))

    def as_dict(self) -> dict[str, Any]:
        """The counts by name."""
        return asdict(self)


class Encoder:
    """Turns examples into rows, each of its answers a sequence of its own.

    Args:
        chat: Renders conversations.
        max_length: Most tokens in a sequence.
        truncation: How a longer row is shortened. ``drop``: it is left out. ``left``: the
            beginning of its prompt is cut (after BOS), by as much from all answers' sequences, and
            it is left out if the answer alone is too long. ``right``: the end of its answer is cut,
            with the end token, and it is left out if nothing of the answer remains.
        all_turns: Train earlier assistant turns too, or as the file says (False); None: the answer
            alone, whatever the file says.
        drop_repeats: Leave out rows that are the same as an earlier one; the hashes of all rows are
            held, about 100 bytes each.
        skip_broken: Leave out rows that cannot be encoded, and count them; else they are an error.

    Raises:
        TemperError: a length below 2.
    """

    def __init__(
        self,
        chat: ChatFormat,
        max_length: int,
        truncation: Truncation = "drop",
        all_turns: bool | None = False,
        drop_repeats: bool = False,
        skip_broken: bool = False,
    ) -> None:
        if max_length < 2:
            raise TemperError(
                f"data.init_args.max_length={max_length}: a prompt and an answer need at least 2"
                " tokens"
            )
        self.chat = chat
        self.max_length = max_length
        self.truncation = truncation
        self.all_turns = all_turns
        self.drop_repeats = drop_repeats
        self.skip_broken = skip_broken

    def rows(self, examples: Iterable[Example], report: EncodeReport) -> Iterator[Row]:
        """Rows of the examples that fit, in their order, counted as they are made. Rows of two
        answers that are the same, before or after they are cut, compare nothing and are left out.

        Raises:
            TemperError: a row cannot be encoded and is not to be left out, naming the row.
        """
        seen: set[bytes] = set()
        report.format = self.chat.facts
        for example in examples:
            encoded = self._encoded(
                example,
                report,
                lambda example: [
                    self.chat.encode(example.prompt, reply, self.all_turns, example.tools)
                    for reply in example.replies
                ],
            )
            sequences = None if encoded is None else self._fitted(encoded, report)
            if sequences is None:
                continue
            if len(sequences) > 1 and _are_equal(sequences):
                report.equal += 1
                continue
            flags = {} if example.desirable is None else {"desirable": example.desirable}
            row = Row([s.ids for s in sequences], [s.trained for s in sequences], flags)
            digest = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
            if digest in seen and self.drop_repeats:
                report.repeats_dropped += 1
                continue
            report.repeats += digest in seen
            seen.add(digest)
            report.count(sequences)
            report.cut += sequences is not encoded
            report.desirable += example.desirable is True
            report.undesirable += example.desirable is False
            yield row

    def prompts(
        self, examples: Iterable[Example], report: EncodeReport
    ) -> Iterator[tuple[Example, list[int]]]:
        """Examples with the tokens of their prompts; one that is too long is cut under ``left``,
        and left out otherwise.

        Raises:
            TemperError: a row cannot be encoded and is not to be left out, naming the row.
        """
        report.format = self.chat.facts
        for example in examples:
            prompt = self._encoded(example, report, lambda e: self.chat.prompt(e.prompt, e.tools))
            if prompt is None:
                continue
            ids = prompt.ids
            excess = len(ids) - self.max_length
            if excess > 0 and self.truncation != "left":
                report.dropped += 1
                continue
            if excess > 0:
                report.cut += 1
                ids = without(ids, ids, excess, self._bos)
            report.count([Encoded(ids, [False] * len(ids), prompt.notes)])
            yield example, ids

    def settings(self) -> dict[str, str | int | bool | None]:
        """Settings that rows depend on beside the examples and the tokenizer, for cache keys."""
        return {
            "encoding": ENCODING,
            "transformers": TRANSFORMERS,
            "template": self.chat.template,
            "known": self.chat.known,
            "system": self.chat.system,
            "thinking": self.chat.thinking,
            "date": self.chat.date,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "all_turns": self.all_turns,
            "drop_repeats": self.drop_repeats,
            "skip_broken": self.skip_broken,
        }

    @property
    def _bos(self) -> int | None:
        bos: int | None = self.chat.tokenizer.bos_token_id
        return bos

    def _encoded(
        self, example: Example, report: EncodeReport, encode: Callable[[Example], T]
    ) -> T | None:
        """Tokens of an example; None if the row cannot be encoded and is left out."""
        report.read += 1
        try:
            return encode(example)
        except RowError as problem:
            if not self.skip_broken:
                raise TemperError(
                    f"{example.file}: row {example.row}: {problem}; fix it, or leave such rows out"
                    " with data.init_args.skip_broken=true"
                ) from problem
            report.refuse(example, str(problem))
            return None

    def _fitted(self, sequences: list[Encoded], report: EncodeReport) -> list[Encoded] | None:
        """The sequences, cut if need be; None where they are left out."""
        if max(len(sequence.ids) for sequence in sequences) <= self.max_length:
            return sequences
        cut = CUTS[self.truncation](sequences, self.max_length, self._bos)
        if cut is None:
            report.dropped += 1
            return None
        if not all(any(sequence.trained) for sequence in cut):
            report.unanswered += 1
            return None
        return cut


def _are_equal(sequences: list[Encoded]) -> bool:
    """Whether a row's sequences have the same tokens, trained alike."""
    return len({(*sequence.ids, None, *sequence.trained) for sequence in sequences}) < 2


def content_hash(path: str, flag: str) -> str:
    """SHA-256 of a file, or of all files of a dataset folder (``folder`` or ``folder:split``).

    Raises:
        TemperError: there is no such file.
    """
    place, _ = locate(path, flag)
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file()):
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.relative_to(place)} {content}\n".encode())
    return f"{digest.hexdigest()} {path.rpartition(':')[2] if place != Path(path) else ''}"
