"""One row of a user's file, whatever its layout: a conversation so far, and the answers to it."""

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Args:
        role: One of `ROLES`.
        content: Text; of an alpaca row, its instruction alone.
        input: What the instruction is about (an article, a sentence), of a user's turn. Alpaca's
            template has a section of its own for it; everything else reads `text`.
        trained: What the file says about training on this assistant turn of a prompt; None where it
            says nothing and the encoder's own rule holds.
    """

    role: str
    content: str
    input: str = ""
    trained: bool | None = None

    @property
    def text(self) -> str:
        """The whole turn: content, and after a blank line the input, if there is one."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


@dataclass(frozen=True)
class Example:
    """A conversation up to the answer, and its answer or answers.

    Args:
        prompt: Turns before the answer, the last one a user's (or a tool's); earlier assistant
            turns are context.
        answers: One for supervised rows, KTO and retain rows; two for preference pairs (chosen,
            rejected) and for forget rows with a substitute (the answer to forget, what to say in
            its place); none for an evaluation prompt.
        desirable: The mark of a KTO row.
        reference: What the right answer is, where answers can be compared with something (a class,
            a number).
        file: Where the row comes from, for errors.
        row: Its number there, from 1: the line of JSONL, the record of other formats.
    """

    prompt: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    desirable: bool | None = None
    reference: str | None = None
    file: str = ""
    row: int = 0

    @property
    def question(self) -> str:
        """The last user turn, its input included: what judges read."""
        return next((m.text for m in reversed(self.prompt) if m.role == "user"), "")

    @property
    def conversation(self) -> str:
        """All turns before the answer but the system's: what overlap reports read."""
        return "\n".join(m.text for m in self.prompt if m.role != "system")
