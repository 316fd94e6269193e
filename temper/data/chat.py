"""Chat templates, the tokenizer of a model, and conversations as tokens with the mask of those that
are trained.

Every format is a Jinja chat template: the tokenizer's own, one of the two that are built in, or a
file. To find an answer's tokens, the conversation is rendered with a marker in the answer's place;
the text before the marker is the prompt. So no template needs ``{% generation %}`` markers, and
templates that add a default system prompt or strip messages need no special case.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from temper.data.examples import Message
from temper.errors import TemperError
from temper.links import check_links

# -- templates

FLAG = "data.init_args.template"

# https://github.com/tatsu-lab/stanford_alpaca, train.py: its two prompts, word for word. Turns
# after the first repeat the sections.
ALPACA = """\
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if loop.first and message.input %}{{ 'Below is an instruction that describes a task, paired \
with an input that provides further \
context. Write a response that appropriately completes the request.' }}
{%- elif loop.first %}{{ 'Below is an instruction that describes a task. Write a response that \
appropriately completes the request.' }}
{%- endif %}{{ '\n\n### Instruction:\n' + message.content }}
{%- if message.input %}{{ '\n\n### Input:\n' + message.input }}{% endif %}{{ '\n\n### Response:' }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
{%- else %}{{ raise_exception('this template has user and assistant turns only, and no ' + \
message.role) }}
{%- endif %}
{%- endfor %}"""
PLAIN = (
    "{%- for message in messages %}{{ message.content + (eos_token if message.role == 'assistant'"
    " else '') + '\n' }}{%- endfor %}"
)
BUILT_IN = {"alpaca": ALPACA, "plain": PLAIN}


def read_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Text of a chat template.

    Args:
        tokenizer: Has the template of ``auto``.
        template: ``auto``, a name in `BUILT_IN`, or a path to a Jinja file.

    Raises:
        TemperError: there is no such template.
    """
    if template in BUILT_IN:
        return BUILT_IN[template]
    if template == "auto":
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise TemperError(
                f"{FLAG}=auto: the tokenizer has no chat template of its own; choose"
                f" {', '.join(BUILT_IN)}, or a path to a Jinja file"
            ) from error
    if not Path(template).is_file():
        raise TemperError(
            f"{FLAG}={template}: no such file; choose auto, {', '.join(BUILT_IN)}, or a path to a"
            " Jinja file"
        )
    return Path(template).read_text(encoding="utf-8")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with BOS by itself."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [
        tokenizer.bos_token_id
    ]


# -- the tokenizer


def load_tokenizer(name: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a folder, or by a hub name from the local cache; one without pad
    token pads with its eos token.

    Args:
        name: Folder or hub name.
        trust_remote_code: Run code that comes with it.

    Raises:
        TemperError: no name is given, nothing has that name, or the tokenizer comes with code that
            was not trusted.
    """
    if name is None:
        raise TemperError(
            "data.init_args.tokenizer is not set: give the folder of the model, or of its tokenizer"
        )
    if Path(name).is_dir():
        check_links(Path(name), f"data.init_args.tokenizer={name}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        # transformers names the flag where code would have to be run
        if "trust_remote_code" in str(error):
            raise TemperError(
                f"data.init_args.tokenizer={name}: it comes with code of its own: set"
                " data.init_args.trust_remote_code=true if you trust its authors"
            ) from error
        raise TemperError(
            f"data.init_args.tokenizer={name}: no folder with a tokenizer, and no tokenizer of that"
            " name in the local hub cache; give the folder of the model"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that a text's tokens depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(
        f"{rules} {sorted(tokenizer.special_tokens_map.items())}".encode()
    ).hexdigest()


# -- conversations as tokens

# Stands where an answer will be; private-use characters, which no text has.
MARK = "\ue0a7answer\ue0a7"
# The character with which transformers marks special tokens that are meant as text.
QUOTE = mark_control_tokens("x", re.compile("x"))[0]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Args:
        ids: Token ids.
        trained: The mask: for each token, whether the model is trained to write it.
    """

    ids: list[int]
    trained: list[bool]


class ChatFormat:
    """Renders conversations, and marks the tokens that are trained.

    * A prompt has the same tokens as at generation: no token spans the end of the prompt and the
      beginning of the answer.
    * The answer and the token that ends it are trained. Anything that a template writes after that
      token is left out at the end of a conversation. If a template ends answers with no token of
      its own, the tokenizer's eos is added.
    * Text that looks like a special token inside a message stays text: it can neither end a turn
      nor begin one.
    * A system message goes into the first user turn, before a blank line, where the template has no
      place for it.
    * With the tokenizer's own template, BOS is added as that template says (so that other tools
      give the model the same prompts); with another template, if either the template or the
      tokenizer adds it.

    Args:
        tokenizer: Of the model.
        template: ``auto`` (the tokenizer's own), ``alpaca``, ``plain`` (a turn to a line), or a
            path to a Jinja file.
        system: System message of conversations that have none.

    Attributes:
        name: ``template`` as it was given.
        template: Text of the template; as a tokenizer's ``chat_template`` it gives the same tokens.
        end: The token that ends an answer.
        folds_system: Whether system messages go into the first user turn.
        stop_ids: Tokens that end an answer, the template's own first.

    Raises:
        TemperError: no such template, or one that cannot be used; a tokenizer without any token
            that ends an answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str = "auto", system: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.name = template
        self.system = system
        self._lead = ""
        self.template = read_template(tokenizer, template)
        if (
            template != "auto"
            and adds_bos(tokenizer)
            and not self._render(_EXAMPLE).startswith(str(tokenizer.bos_token))
        ):
            self.template = "{{- bos_token }}" + self.template
        added = [
            token
            for token in tokenizer.added_tokens_decoder.values()
            if not token.content.isspace()
        ]
        self._control = _any_of(
            [token.content for token in added if token.special or token.content in self.template]
        )
        self.folds_system = not self._takes_system()
        self._lead = self._blank_before_answers()
        self._reads_input = "INPUT" in self._render(
            [{"role": "user", "content": "a question", "input": "INPUT"}, _EXAMPLE[1]]
        )
        ended = re.match(
            rf"\s*({_any_of([token.content for token in added]).pattern})",
            self._around(_EXAMPLE, 1)[1],
        )
        self.end = ended.group(1) if ended else tokenizer.eos_token
        if self.end is None:
            raise TemperError(
                f"{FLAG}={template}: neither it nor the tokenizer has a token that ends an answer;"
                " set tokenizer.eos_token"
            )
        self._appends_end = ended is None
        self._ended = re.compile(rf"\s*{re.escape(self.end)}")
        ends = [tokenizer.convert_tokens_to_ids(self.end), tokenizer.eos_token_id]
        self.stop_ids: list[int] = [i for i in dict.fromkeys(ends) if i is not None]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt, up to where the answer is generated.

        Raises:
            TemperError: the template does not take these turns.
        """
        turns = [*self._turns(self._prepared(messages)), _EXAMPLE[1]]
        return self._tokens(self._around(turns, len(turns) - 1)[0])

    def encode(
        self, messages: Sequence[Message], answer: str, all_turns: bool | None = False
    ) -> Encoded:
        """Tokens of a conversation with its answer; they begin with `prompt_ids` (with
        ``all_turns``, if its prompts do not end inside a word).

        Args:
            messages: Turns before the answer.
            answer: The last assistant turn, which is trained.
            all_turns: Train earlier assistant turns too, except those marked as not trained; None:
                the answer alone, whatever the marks say.

        Raises:
            TemperError: the template does not take these turns.
        """
        messages = self._prepared(messages)
        turns = [*self._turns(messages), *self._turns([Message("assistant", answer)])]
        earlier = (
            []
            if all_turns is None
            else [i for i, m in enumerate(messages) if m.role == "assistant"]
        )
        trained = [
            i
            for i in earlier
            if (all_turns if messages[i].trained is None else messages[i].trained)
        ]
        text = self._render(turns)
        row = _Row(self)
        for i in (*trained, len(messages)):
            before, after = self._around(turns, i)
            if not (text.startswith(before) and text.endswith(after)):
                raise TemperError(
                    f"{FLAG}={self.name}: the text around turn {i + 1} depends on what the turn"
                    " says; use another template"
                )
            end = len(text) - len(after)
            ended = self._ended.match(text, end)
            row.write(text[: len(before)], False)
            row.write(text[: ended.end() if ended else end], True)
        if self._appends_end:
            row.add([self.stop_ids[0]], True)
        return Encoded(row.ids, row.trained)

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

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Turns as templates take them, with special tokens in them marked as text."""
        fields = [
            (
                {"content": m.content, "input": m.input}
                if self._reads_input and m.input
                else {"content": m.text}
            )
            for m in messages
        ]
        marked = [
            {name: mark_control_tokens(text, self._control) for name, text in turn.items()}
            for turn in fields
        ]
        return [{"role": m.role} | turn for m, turn in zip(messages, marked, strict=True)]

    def _render(self, turns: list[dict[str, str]], to_go_on: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=to_go_on,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise TemperError(
                f"{FLAG}={self.name}: the template refuses the turns {roles}: {error}"
            ) from error

    def _around(self, turns: list[dict[str, str]], number: int) -> tuple[str, str]:
        """The text before a turn, and the text after it."""
        text = self._render(
            [turn | {"content": MARK} if i == number else turn for i, turn in enumerate(turns)]
        )
        if text.count(MARK) != 1:
            raise TemperError(
                f"{FLAG}={self.name}: it writes turn {number + 1} {text.count(MARK)} times, and"
                " must once"
            )
        before, _, after = text.partition(MARK)
        return before.removesuffix(self._lead), after

    def _blank_before_answers(self) -> str:
        """Blanks that the template writes before a given answer but not where one is generated:
        they count as the answer's (Llama 2).
        """
        prompt = self._render(_EXAMPLE[:1], to_go_on=True)
        before, _ = self._around(_EXAMPLE, 1)
        rest = before.removeprefix(prompt) if before.startswith(prompt) else ""
        return rest if rest.isspace() else ""

    def _takes_system(self) -> bool:
        try:
            return "SYSTEM" in self._render([{"role": "system", "content": "SYSTEM"}, *_EXAMPLE])
        except TemperError:
            return False

    def _tokens(self, text: str) -> list[int]:
        if QUOTE not in text:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        try:
            return list(encode_marked_chat(self.tokenizer, text))
        except ValueError as error:
            # A tokenizer of whole words has no other way to write the token.
            raise TemperError(
                f"the tokenizer cannot write a special token as text: {error}; take it out of"
                " the row"
            ) from error

    def _continued(self, text: str) -> list[int]:
        """Tokens of a text in the middle of a conversation: tokenised after a line break, since
        some tokenizers begin a text with a space.
        """
        line_break = self._tokens("\n")
        ids = self._tokens("\n" + text)
        return (
            ids[len(line_break) :] if ids[: len(line_break)] == line_break else self._tokens(text)
        )


class _Row:
    """Tokens of a conversation, appended section by section."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.text = ""
        self.ids: list[int] = []
        self.trained: list[bool] = []

    def write(self, text: str, trained: bool) -> None:
        """Extend the row to ``text``, which begins with the text so far: with the tokens of the
        whole text if they begin with those so far, else with tokens of the rest alone.
        """
        whole = self.chat._tokens(text)
        same = whole[: len(self.ids)] == self.ids
        self.add(
            whole[len(self.ids) :] if same else self.chat._continued(text[len(self.text) :]),
            trained,
        )
        self.text = text

    def add(self, ids: list[int], trained: bool) -> None:
        """Append tokens."""
        self.ids += ids
        self.trained += [trained] * len(ids)


_EXAMPLE: list[dict[str, Any]] = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
]


def _any_of(words: list[str]) -> re.Pattern[str]:
    """Pattern of any of the words, longer ones first; without words it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
