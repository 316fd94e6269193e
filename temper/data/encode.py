"""Examples to rows of tokens: encoding, truncation of rows that are too long, and a report that
counts the rows kept, cut and left out.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeVar

from temper.data.chat import ChatFormat, Encoded
from temper.data.examples import Example
from temper.data.files import locate
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
ENCODING = 3


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
        repeats: Rows kept that are the same as an earlier one, token for token.
        repeats_dropped: Such rows left out (``drop_repeats``).
        sequences: Sequences in the rows kept: two in a pair.
        tokens: Tokens in them.
        trained: Tokens with a label among those.
        longest: Tokens of the longest.
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
    repeats: int = 0
    repeats_dropped: int = 0
    sequences: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
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

    def __str__(self) -> str:
        left_out = {
            "too long": self.dropped,
            "nothing of the answer left": self.unanswered,
            "broken": self.broken,
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
        return "; ".join(
            [rows, *([tokens] if self.kept else []), *filter(None, (self.format, self.layout))]
        )

    def as_dict(self) -> dict[str, int | str]:
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

    def rows(self, examples: Iterable[Example], report: EncodeReport) -> Iterator[Row]:
        """Rows of the examples that fit, in their order, counted as they are made.

        Raises:
            TemperError: the template does not take a row's turns, naming the row.
        """
        seen: set[bytes] = set()
        report.format = self.chat.facts
        for example in examples:
            report.read += 1
            with _named(example):
                encoded = [
                    self.chat.encode(example.prompt, reply, self.all_turns, example.tools)
                    for reply in example.replies
                ]
            sequences = self._fitted(encoded, report)
            if sequences is None:
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
            yield row

    def prompts(
        self, examples: Iterable[Example], report: EncodeReport
    ) -> Iterator[tuple[Example, list[int]]]:
        """Examples with the tokens of their prompts; one that is too long is cut under ``left``,
        and left out otherwise.

        Raises:
            TemperError: the template does not take a row's turns, naming the row.
        """
        report.format = self.chat.facts
        for example in examples:
            report.read += 1
            with _named(example):
                prompt = self.chat.prompt(example.prompt, example.tools)
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
            "system": self.chat.system,
            "thinking": self.chat.thinking,
            "date": self.chat.date,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "all_turns": self.all_turns,
            "drop_repeats": self.drop_repeats,
        }

    @property
    def _bos(self) -> int | None:
        bos: int | None = self.chat.tokenizer.bos_token_id
        return bos

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
        report.cut += 1
        return cut


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


@contextlib.contextmanager
def _named(example: Example) -> Iterator[None]:
    """Add file and row to errors."""
    try:
        yield
    except TemperError as error:
        raise TemperError(f"{example.file}: row {example.row}: {error}") from error
