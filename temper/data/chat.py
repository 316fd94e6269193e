"""Conversations as tokens, with the mask of those that are trained.

A prompt is what a server makes of the turns: the template's own generation prompt. What is trained
is what the model has to write after it: the answer as the template writes it, proven to be whole
(`temper.data.rendered`), and the token that ends it. So no template needs ``{% generation %}``
markers, and templates that add a default system prompt or strip messages need no special case.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from temper.data.examples import Message
from temper.data.readers import RowError
from temper.data.rendered import (
    REASONING_KEYS,
    Conversation,
    Rendered,
    Renderer,
    check_calls,
    check_tools,
)
from temper.data.templates import FLAG, Template, read_template
from temper.data.tokenizer import (
    QUOTES,
    TextCheck,
    TokenRow,
    adds_bos,
    any_of,
    control_tokens,
    encode_quoted,
)
from temper.errors import TemperError

Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Args:
        ids: Token ids.
        trained: The mask: for each token, whether the model is trained to write it.
        notes: Names of counts of `temper.data.encode.EncodeReport` that this conversation is one
            of: ``stripped``, ``reasoning_dropped``, ``last_only``, ``reasoning_added``.
    """

    ids: list[int]
    trained: list[bool]
    notes: frozenset[str] = frozenset()


class ChatFormat:
    """Renders conversations, and marks the tokens that are trained.

    * A prompt has the same tokens as at generation: no token spans the end of the prompt and the
      beginning of the answer.
    * The answer and the token that ends it are trained. Anything that a template writes after that
      token is left out at the end of a conversation. If a template ends answers with no token of
      its own, the tokenizer's eos is added.
    * Every character of the turns is in the tokens, or the row is refused; white space at the ends
      of a turn, which templates strip, and reasoning of earlier turns, which templates drop, aside.
    * An answer's reasoning is trained, also where the template would drop it: it is then written
      after the prompt as the model would write it. Where the prompt itself opens the reasoning, an
      answer without any closes it first.
    * Text that looks like a control token inside a message stays text: it can neither end a turn
      nor begin one. The tags around an answer's reasoning are tokens.
    * A system message goes into the first user turn, before a blank line, where the template has no
      place for it.
    * With the tokenizer's own template, BOS is added as that template says (so that other tools
      give the model the same prompts); with another template, if either the template or the
      tokenizer adds it.

    Args:
        tokenizer: Of the model.
        template: ``auto`` (the tokenizer's own), ``alpaca``, ``booster`` (alpaca's with a newline
            after ``### Response:``), ``plain`` (a turn to a line), or a path to a Jinja file.
        system: System message of conversations that have none.
        thinking: Prompt for reasoning, or not, where the template has a switch for it; None: as a
            server does that is not told.
        date: Today's date in templates that write it, ``YYYY-MM-DD``; None: `templates.DATE`.

    Attributes:
        name: ``template`` as it was given.
        template: Text of the template; as a tokenizer's ``chat_template`` it gives the same tokens.
        end: The token that ends an answer.
        folds_system: Whether system messages go into the first user turn.
        opens: Whether prompts end with the opening tag of reasoning.
        known: Control tokens that stay text in messages, and tags of reasoning; for cache keys.
        stop_ids: Tokens that end an answer, the template's own first.

    Raises:
        TemperError: no such template, or one that cannot be used; a tokenizer without any token
            that ends an answer; ``thinking`` or ``date`` for a template that does not read it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        system: str | None = None,
        thinking: bool | None = None,
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        self.thinking = thinking
        text = read_template(tokenizer, template)
        self._template = Template(tokenizer, template, text, thinking, date)
        if (
            template != "auto"
            and adds_bos(tokenizer)
            and not self._template.render(_EXAMPLE).startswith(str(tokenizer.bos_token))
        ):
            text = "{{- bos_token }}" + text
            self._template = Template(tokenizer, template, text, thinking, date)
        self.template = text
        self._render = Renderer(self._template)
        control = control_tokens(tokenizer, text)
        # Both depend on the tokenizer's own template too, which this one replaces in exports.
        self.known = f"{control.pattern} {self._template.tags}"
        self._quote = partial(mark_control_tokens, control_tokens_re=control)
        self._check_text = TextCheck(tokenizer, control)
        self._reads_input = False
        self.opens = False
        try:
            self._try_out()
        except RowError as error:  # of no row, but of the template
            raise TemperError(str(error)) from error

    def _try_out(self) -> None:
        """Find out how the template writes turns."""
        added = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if not token.content.isspace()
        ]
        self._added = re.compile(rf"\s*({any_of(added).pattern})")
        user, answer = (Message(turn["role"], turn["content"]) for turn in _EXAMPLE)
        self._reads_input = "INPUT" in self._template.render(
            [{**_EXAMPLE[0], "input": "INPUT"}, _EXAMPLE[1]]
        )
        whole = self._render(self._talk([user, answer]))
        span = whole.spans[1]
        if whole.unmatched is not None:
            raise TemperError(self._changed(whole.unmatched, [user, answer]))
        if span is None:
            raise TemperError(f"{FLAG}={self.name}: it writes turn 2 0 times, and must once")
        self.folds_system = not self._takes_system()
        prompt = self._render(self._talk([user]), to_go_on=True).text
        tags = self._template.tags
        self.opens = tags is not None and prompt.rstrip().endswith(tags[0])
        self._closes = tags is not None and prompt.rstrip().endswith(tags[1])
        self._header = (
            whole.text[len(prompt) : span[0]].strip() if whole.text.startswith(prompt) else ""
        )
        self._find_end(whole.text[span[1] :])
        self._try_rounds(user, answer, prompt)

    def _try_rounds(self, user: Message, answer: Message, prompt: str) -> None:
        """Find out how the template writes earlier answers: `_lead` stands between their prompt and
        them, such as the blank of Llama 2, and `_earlier_ended` is what ends them.
        """
        self._lead = ""
        self._prompts_as_history = True
        self._earlier_ended = re.compile("(?!)")
        try:
            rounds = self._render(self._talk([user, answer, user, answer]))
        except RowError:
            return
        first, span, second = rounds.spans[:3]
        if not (first and span and second) or not rounds.text[: span[0]].startswith(prompt):
            self._prompts_as_history = False  # nor are they trained
            return
        self._lead = rounds.text[len(prompt) : span[0]]
        ended, asked = (self._added.match(rounds.text, end) for end in (span[1], first[1]))
        # A token that begins a user's turn ends none.
        if ended and (ended.group(1) == self.end or (asked and ended.group(1) == asked.group(1))):
            self._earlier_ended = re.compile(rf"\s*{re.escape(ended.group(1))}(?!{QUOTES[1]})")

    def _find_end(self, after: str) -> None:
        """Find out which token ends answers, from what the template writes after one."""
        ended = self._added.match(after)
        self.end = ended.group(1) if ended else self.tokenizer.eos_token
        if self.end is None:
            raise TemperError(
                f"{FLAG}={self.name}: neither it nor the tokenizer has a token that ends an answer;"
                " set tokenizer.eos_token"
            )
        self._appends_end = ended is None
        self._ended = re.compile(rf"\s*{re.escape(self.end)}(?!{QUOTES[1]})")
        ends = [self.tokenizer.convert_tokens_to_ids(self.end), self.tokenizer.eos_token_id]
        self.stop_ids: list[int] = [i for i in dict.fromkeys(ends) if i is not None]

    @property
    def date(self) -> str | None:
        """The date that the template writes; None: it writes none."""
        return self._template.date

    @property
    def facts(self) -> str:
        """Choices that prompts depend on and that files do not show, in words; for reports."""
        facts = []
        if self._template.thinking_name is not None:
            given = "the template's default" if self.thinking is None else str(self.thinking)
            facts.append(f"{self._template.thinking_name}: {given.lower()}")
        if self.opens:
            facts.append("prompts open the reasoning")
        if self.date is not None:
            facts.append(f"dated {self.date}")
        tags = self._template.tags
        if self._header and not (tags and tags[1] in self._header):
            facts.append(f"no prompt for answers, which begin with {self._header!r}")
        return ", ".join(facts)

    # -- encoding

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Encoded:
        """Tokens of a prompt, up to where the answer is generated.

        Args:
            messages: Turns before the answer.
            tools: Descriptions of tools.

        Raises:
            RowError: the template does not take these turns, or does not write them whole.
        """
        prompt, notes = self._prompt(self._prepared(messages), tools)
        ids = encode_quoted(self.tokenizer, prompt)
        return Encoded(ids, [False] * len(ids), frozenset(notes))

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of a prompt: see `prompt`."""
        return self.prompt(messages, tools).ids

    def encode(
        self,
        messages: Sequence[Message],
        answer: str | Message,
        all_turns: bool | None = False,
        tools: Tools = (),
    ) -> Encoded:
        """Tokens of a conversation with its answer; they begin with `prompt_ids` (with
        ``all_turns``, if its prompts do not end inside a word).

        Args:
            messages: Turns before the answer.
            answer: The last assistant turn, which is trained.
            all_turns: Train earlier assistant turns too, except those marked as not trained; None:
                the answer alone, whatever the marks say.
            tools: Descriptions of tools.

        Raises:
            RowError: the template does not take these turns, or does not write them whole.
        """
        messages = self._prepared(messages)
        prompt, notes = self._prompt(messages, tools)
        last = Message("assistant", answer) if isinstance(answer, str) else answer
        talk = self._talk([*messages, last])
        for piece in talk.pieces:
            if piece.turn == len(messages):
                self._check_text(piece.text)
        earlier = [
            n
            for n, message in enumerate(messages)
            if message.role == "assistant"
            and all_turns is not None
            and (all_turns if message.trained is None else message.trained)
        ]
        whole = self._render(talk, self._tools(tools))
        row = TokenRow(self.tokenizer)
        if not self._is_whole(talk, whole, prompt):
            row.write(prompt, False)
            row.write(prompt + self._composed(talk, prompt, notes), True)
            if earlier:
                notes.add("last_only")
        else:
            if earlier and ("reasoning_dropped" in notes or not self._prompts_as_history):
                notes.add("last_only")
                earlier = []
            for number in earlier:
                start, end = self._earlier_span(talk, whole, number, tools)
                row.write(whole.text[:start], False)
                row.write(whole.text[:end], True)
            end = self._answer_end(talk, whole, len(prompt))
            row.write(prompt, False)
            row.write(whole.text[:end], True)
            self._note_added(talk, whole, len(prompt), notes)
        if row.text[-len(self.end) :] != self.end or self._appends_end:
            row.add([self.stop_ids[0]], True)
        if whole.stripped:
            notes.add("stripped")
        return Encoded(row.ids, row.trained, frozenset(notes))

    def _prompt(self, messages: Sequence[Message], tools: Tools) -> tuple[str, set[str]]:
        """Text of a prompt that holds all its turns, and notes on it."""
        self._check_row(messages, tools)
        talk = self._talk(messages)
        for piece in talk.pieces:
            self._check_text(piece.text)
        prompt = self._render(talk, self._tools(tools), to_go_on=True)
        if prompt.unmatched is not None:
            raise RowError(self._changed(prompt.unmatched, messages))
        notes = {"stripped"} if prompt.stripped else set()
        for piece, span in zip(talk.pieces, prompt.spans, strict=True):
            if span is None and piece.name != "reasoning":
                raise RowError(
                    f"{FLAG}={self.name}: it leaves out turn {piece.turn + 1}"
                    f" ({messages[piece.turn].role}); take the turn out, or use another template"
                )
            if span is None:
                notes.add("reasoning_dropped")
        for block in talk.blocks:
            if block and not block[2].strip() and "".join(block[1:4]) not in prompt.text:
                notes.add("reasoning_dropped")  # an empty block of it
        if tools:
            check_tools(self._tools(tools) or (), prompt.text)
        for message in messages:
            if message.tool_calls:
                check_calls(self._quote(list(message.tool_calls)), prompt.text)
        return prompt.text, notes

    def _check_row(self, messages: Sequence[Message], tools: Tools) -> None:
        """Check that the template has a place for what a row holds beside texts."""
        if tools and not self._template.reads_tools:
            raise RowError(
                f"{FLAG}={self.name}: the row has tools, and the template has no place for them"
                " (it does not read `tools`); take them out, or use another template"
            )
        for message in messages:
            if message.tool_calls and "tool_calls" not in self.template:
                raise RowError(
                    f"{FLAG}={self.name}: a turn calls tools, and the template has no place for"
                    " calls (it does not read `tool_calls`); use another template"
                )
            if message.reasoning and not any(key in self.template for key in REASONING_KEYS):
                raise RowError(
                    f"{FLAG}={self.name}: a turn has its reasoning under a key of its own, and the"
                    f" template reads no {' or '.join(REASONING_KEYS)}; write it into the content,"
                    " in the model's tags"
                )

    def _is_whole(self, talk: Conversation, whole: Rendered, prompt: str) -> bool:
        """Whether the template itself writes the whole answer after the prompt."""
        number = len(talk.messages) - 1
        last = talk.messages[number]
        self._check_row([last], ())
        missing = [
            piece
            for piece, span in zip(talk.pieces, whole.spans, strict=True)
            if piece.turn == number and span is None
        ]
        block = talk.blocks[number]
        is_whole = (
            whole.unmatched is None
            and not missing
            and whole.text.startswith(prompt)
            and (block is None or block[3] in whole.text[len(prompt) :])
        )
        if is_whole or (block and not last.tool_calls):
            return is_whole
        if whole.unmatched is not None:
            raise RowError(self._changed(whole.unmatched, talk.messages))
        if missing or last.tool_calls or last.reasoning:
            raise RowError(
                f"{FLAG}={self.name}: it does not write the whole answer after its own prompt"
                f" ({'reasoning' if last.reasoning else 'tool calls' if last.tool_calls else ''}"
                " is missing or elsewhere); use another template"
            )
        return False

    def _composed(self, talk: Conversation, prompt: str, notes: set[str]) -> str:
        """What the model has to write after the prompt where the template would not: the answer
        as it is in the file, its reasoning in the model's tags, and the end token.
        """
        content = self._quote(talk.messages[-1].content)
        block = talk.blocks[-1]
        tags = self._template.tags
        end = "" if self._appends_end else self.end
        if block and self._closes:
            raise RowError(
                f"{FLAG}={self.name}: the answer has reasoning, and its prompt is one for answers"
                " without; set data.init_args.thinking=true or null"
            )
        if block:
            blank, opening, *rest = block
            written = "".join(rest) + end
            if not self.opens:
                return blank + opening + written
            # The prompt has the opening tag, and often the line break after it.
            return written.removeprefix("\n") if opening and prompt.endswith("\n") else written
        if self.opens and tags:
            notes.add("reasoning_added")
            return f"\n{tags[1]}\n\n{content}{end}"
        return f"{content}{end}"

    def _note_added(self, talk: Conversation, whole: Rendered, start: int, notes: set[str]) -> None:
        """Note an empty block of reasoning that the template writes before the answer."""
        tags = self._template.tags
        if tags is None or talk.blocks[-1] or talk.messages[-1].reasoning:
            return
        number = len(talk.messages) - 1
        first = next(
            (s for p, s in zip(talk.pieces, whole.spans, strict=True) if p.turn == number), None
        )
        if first is not None and tags[1] in whole.text[start : first[0]]:
            notes.add("reasoning_added")

    def _answer_end(self, talk: Conversation, whole: Rendered, start: int) -> int:
        """Where the last turn ends, its end token included."""
        number = len(talk.messages) - 1
        after = max(
            (s[1] for p, s in zip(talk.pieces, whole.spans, strict=True) if s and p.turn == number),
            default=len(whole.text.rstrip()) if self._appends_end else start,
        )
        calls = talk.messages[-1].tool_calls
        if calls:
            check_calls(self._quote(list(calls)), whole.text[start:])
            ends = [found.end() for found in self._ended.finditer(whole.text, after)]
            return ends[-1] if ends else len(whole.text.rstrip())
        if self._appends_end:
            return after
        ended = self._ended.match(whole.text, after) or self._ended.search(whole.text, after)
        return ended.end() if ended else after

    def _earlier_span(
        self, talk: Conversation, whole: Rendered, number: int, tools: Tools
    ) -> tuple[int, int]:
        """Where an earlier assistant turn begins and ends."""
        spans = [
            span
            for piece, span in zip(talk.pieces, whole.spans, strict=True)
            if piece.turn == number and span
        ]
        message = talk.messages[number]
        if message.tool_calls or not spans:
            prompt = self._render(
                self._talk(talk.messages[:number]), self._tools(tools), to_go_on=True
            ).text
            ended = self._ended.search(whole.text, spans[-1][1] if spans else len(prompt))
            if not whole.text.startswith(prompt) or ended is None:
                raise RowError(
                    f"{FLAG}={self.name}: where turn {number + 1} (assistant) begins and ends"
                    " cannot be told; set data.init_args.all_turns=false"
                )
            return len(prompt), ended.end()
        start = spans[0][0]
        tags = self._template.tags
        if tags and (talk.blocks[number] or message.reasoning):
            start = max(start - len(tags[0]) - 1, whole.text.rfind(tags[0], 0, start))
        if whole.text.endswith(self._lead, 0, start):
            start -= len(self._lead)
        ended = self._earlier_ended.match(whole.text, spans[-1][1])
        return start, ended.end() if ended else spans[-1][1]

    # -- turns

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """The turns with the system message in its place."""
        turns = list(messages)
        if self.system is not None and not (turns and turns[0].role == "system"):
            turns.insert(0, Message("system", self.system))
        if (
            self.folds_system
            and len(turns) > 1
            and turns[0].role == "system"
            and turns[1].role == "user"
        ):
            turns[:2] = [replace(turns[1], content=f"{turns[0].text}\n\n{turns[1].content}")]
        return turns

    def _talk(self, messages: Sequence[Message]) -> Conversation:
        return Conversation(
            messages, self._template.tags, self._quote, self._reads_input, self.opens
        )

    def _tools(self, tools: Tools) -> list[Any] | None:
        """Tools as the template takes them, special tokens in them marked as text."""
        return list(self._quote(list(tools))) if tools else None

    def _takes_system(self) -> bool:
        try:
            return "SYSTEM" in self._template.render(
                [{"role": "system", "content": "SYSTEM"}, *_EXAMPLE]
            )
        except RowError:
            return False

    def _changed(self, number: int, messages: Sequence[Message]) -> str:
        tags = self._template.tags
        role = messages[number].role
        cut = f", or cuts it at {tags[1]}" if tags and tags[1] in messages[number].content else ""
        return (
            f"{FLAG}={self.name}: the text around turn {number + 1} ({role}) depends on what the"
            f" turn says{cut}, so that it is not all there; take the row out, or use another"
            " template"
        )


_EXAMPLE: list[dict[str, Any]] = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]
