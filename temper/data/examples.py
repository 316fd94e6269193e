"""Examples: one row of a user's file, whatever its layout, as a conversation and its answers."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Args:
        role: One of `ROLES`.
        content: Text; of an alpaca row, its instruction alone.
        input: Alpaca's input, of a user's turn: the article or sentence that the instruction is
            about. Alpaca's template has a section for it; everything else reads `text`.
        trained: Whether the file says to train on this assistant turn of a prompt; None where it
            says nothing and the encoder's own rule holds.
        reasoning: An assistant's reasoning, where the file has it apart from the content.
        tool_calls: An assistant's calls of tools, as chat templates take them.
        labels: Further keys of a tool's turn: its name, and the number of the call.
    """

    role: str
    content: str
    input: str = ""
    trained: bool | None = None
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """Text of the whole turn: content, and after a blank line the input, if there is one."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


@dataclass(frozen=True)
class Example:
    """A conversation up to the answer, and its answer or answers.

    Args:
        prompt: Turns before the answer, the last one a user's (or a tool's); earlier assistant
            turns are context.
        answers: One for supervised rows, KTO and retain rows; two for preference pairs (chosen,
            rejected) and for forget rows with a substitute (the answer to forget, the substitute);
            none for an evaluation prompt.
        desirable: Label of a KTO row.
        reference: The right answer, if answers can be compared with one (a class, a number).
        file: File of the row, for errors.
        row: Its number there, from 1: the line of JSONL, the record of other formats.
        tools: Descriptions of the tools that can be called, as chat templates take them.
        turns: The answers as turns, where one holds more than text: reasoning, calls of tools.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    desirable: bool | None = None
    reference: str | None = None
    file: str = ""
    row: int = 0
    tools: tuple[dict[str, Any], ...] = ()
    turns: tuple[Message, ...] = ()

    @property
    def replies(self) -> tuple[Message, ...]:
        """The answers as turns."""
        rest = self.answers[len(self.turns) :]
        return (*self.turns, *(Message("assistant", answer) for answer in rest))

    @property
    def question(self) -> str:
        """Text of the last user turn, with its input; judges read it."""
        return next((m.text for m in reversed(self.prompt) if m.role == "user"), "")

    @property
    def conversation(self) -> str:
        """Text of all turns before the answer except the system's; overlap checks read it."""
        return "\n".join(m.text for m in self.prompt if m.role != "system")
