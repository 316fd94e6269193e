"""Chat templates: those that are built in, reading one, and rendering turns as a server does.

Every format is a Jinja chat template: the tokenizer's own, one of those that are built in, or a
file. It is compiled by transformers, in the environment that servers use, and gets what they give
it: turns, tools, the tokenizer's special tokens, and the switch between thinking and not where the
user sets one. Only the date is another: one for the whole run.
"""

from collections.abc import Callable, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from jinja2 import meta, nodes
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from temper.data.readers import RowError
from temper.data.tokenizer import own_template
from temper.errors import TemperError

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
# The same in Booster's code (git-disl/Booster, utils.py and pred_eval.py): the prompt ends with a
# newline.
BOOSTER = ALPACA.replace("### Response:'", "### Response:\n'")
BUILT_IN = {"alpaca": ALPACA, "booster": BOOSTER, "plain": PLAIN}

#: The day that a template writes which asks for today's. Any day does, and a fixed one gives every
#: stage of a study, every resumed run and the cache the same prompts.
DATE = "2025-01-01"
THINKING = ("enable_thinking", "thinking")  # names of the switch in templates
#: Tags around reasoning: Qwen3, DeepSeek R1 and most others; Magistral; Command A; Kimi; Seed-OSS.
REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
)
# Errors of a template's own expressions, on turns that it was not written for.
FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

Turns = Sequence[dict[str, Any]]


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


class Template:
    """A chat template that is ready to render.

    Args:
        tokenizer: Its special tokens are what the template knows as ``bos_token`` and so on.
        name: The flag's value, for errors.
        text: The template.
        thinking: Given to the template under the name of its switch; None: the template's default.
        day: Date for templates that write today's, ``YYYY-MM-DD``; None: `DATE`.

    Attributes:
        thinking_name: The template's name for that switch; None: it has none.
        date: The date that the template writes; None: it writes none.
        reads_tools: Whether it has a place for tools.
        tags: Opening and closing tag of reasoning, as the template or the tokenizer knows them;
            None: neither knows any.

    Raises:
        TemperError: no valid template; a date or a choice of thinking that it does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        text: str,
        thinking: bool | None = None,
        day: str | None = None,
    ) -> None:
        self.name = name
        self.text = text
        try:
            self._compiled = _compile_jinja_template(text)
            tree = self._compiled.environment.parse(text)
        except TemplateError as error:
            raise TemperError(f"{FLAG}={name}: no valid Jinja template: {error}") from error
        read = meta.find_undeclared_variables(tree)
        names = {node.name for node in tree.find_all(nodes.Name)}  # the environment's own included
        self.reads_tools = "tools" in read
        self.thinking_name = next((word for word in THINKING if word in read), None)
        self.date = _date(day, "strftime_now" in names, name)
        self._given: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if self.date is not None:
            self._given["strftime_now"] = _clock(self.date)
        if thinking is not None:
            if self.thinking_name is None:
                raise TemperError(
                    f"data.init_args.thinking={str(thinking).lower()}: the template ({name}) reads"
                    f" no {' or '.join(THINKING)}, so nothing would change; leave it at null"
                )
            self._given[self.thinking_name] = thinking
        known = text + own_template(tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self.tags = next(
            (tags for tags in REASONING if tags[1] in known or set(tags) <= added), None
        )

    def render(self, turns: Turns, tools: list[Any] | None = None, to_go_on: bool = False) -> str:
        """Text of a conversation.

        Args:
            turns: As `PreTrainedTokenizerBase.apply_chat_template` takes them.
            tools: Descriptions of tools.
            to_go_on: End in the prompt for an answer, as a server does.

        Raises:
            RowError: the template does not take these turns.
        """
        try:
            return str(
                self._compiled.render(
                    messages=turns,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=to_go_on,
                    **self._given,
                )
            )
        except FAILURES as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise RowError(
                f"{FLAG}={self.name}: the template refuses the turns {roles}: {error}"
            ) from error


def _date(day: str | None, is_read: bool, name: str) -> str | None:
    """The date that a template writes."""
    if day is None:
        return DATE if is_read else None
    if not is_read:
        raise TemperError(
            f"data.init_args.date={day}: the template ({name}) does not ask for today's date;"
            " leave it at null"
        )
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError as error:
        raise TemperError(f"data.init_args.date={day}: give a day as 2025-01-31") from error


def _clock(day: str) -> Callable[[str], str]:
    """A template's ``strftime_now``, stopped at the beginning of a day."""
    return datetime.fromisoformat(day).strftime
