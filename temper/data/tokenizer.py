"""The tokenizer of a model: loading it, its hash, and text whose control tokens stay text.

A control token is one that a chat template writes to begin or end something. In the text of a
message it is put between two private marks, and encoded as the characters that it is spelled with.
"""

import hashlib
import re
import sys
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from temper.data.readers import RowError
from temper.errors import TemperError


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


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with BOS by itself."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [
        tokenizer.bos_token_id
    ]


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of all chat templates that come with a tokenizer; empty without any."""
    own: Any = tokenizer.chat_template
    return "\n".join(own.values()) if isinstance(own, dict) else own or ""


# -- control tokens in a text

# The characters that transformers puts around control tokens that are meant as text.
QUOTES: tuple[str, str] = tuple(mark_control_tokens("x", re.compile("x")).split("x"))
# Stands for a turn's text where a template is tried out: the last code point for private use.
PLACE = chr(sys.maxunicode - 2)
PRIVATE = re.compile(f"[{''.join(QUOTES)}{PLACE}]")
# A text with characters of all kinds, to find out whether a tokenizer can write any.
PROBE = (
    "".join(map(chr, range(33, 127))) + "\x07 é ß ж ت 漢 か 한 😀 👩\u200d🚀 \ue000 \u2028 ½ ﬁ Å"
)


def any_of(words: list[str]) -> re.Pattern[str]:
    """Pattern of any of the words, longer ones first; without words it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Pattern of the tokens that stay text inside messages: special ones, whatever a template
    names, the tokenizer's own included, and those that the tokenizer itself lists.

    Added tokens that are none of these (words, tags of HTML) are tokens wherever they stand.
    """
    named = template + own_template(tokenizer)
    listed = getattr(tokenizer, "chat_control_tokens", None) or ()
    return any_of(
        [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if not token.content.isspace()
            and (token.special or token.content in named or token.content in listed)
        ]
    )


def encode_quoted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, without those that the tokenizer adds around it; tokens between marks of
    `transformers.utils.chat_template_utils.mark_control_tokens` as plain text, without the marks.

    Raises:
        RowError: the tokenizer has no other way to write such a token, as one of whole words.
    """
    if not any(mark in text for mark in QUOTES):
        return list(tokenizer.encode(text, add_special_tokens=False))
    try:
        return list(encode_marked_chat(tokenizer, text))
    except ValueError as error:
        raise RowError(
            f"the tokenizer cannot write a special token as text: {error}; take it out of the row"
        ) from error


def unmark(text: str) -> str:
    """A text without the private marks."""
    return PRIVATE.sub("", text)


class Quoting:
    """Marks the control tokens in a text that a model judges or reads, for `encode_quoted`.

    Args:
        tokenizer: The tokenizer.
        template: Text around it; added tokens in it are control tokens too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer, template)

    def __call__(self, text: str) -> str:
        """The text, marked. A token that the tokenizer has no other way to write, as one of whole
        words, gets a blank after its first character.
        """
        marked: str = mark_control_tokens(text, self._control)
        if marked == text:
            return text
        try:
            encode_quoted(self._tokenizer, marked)
        except RowError:
            return self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", unmark(text))
        return marked


class TextCheck:
    """Whether a tokenizer writes every character of a text, and no control token for it.

    Most tokenizers, those of bytes, write anything; for the others every text is encoded and
    decoded once more. Compared is the text after the tokenizer's own normaliser (lower case, NFKC),
    without white space, which tokenizers of words do not keep.

    Args:
        tokenizer: The tokenizer.
        control: Pattern of its control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]) -> None:
        self.tokenizer = tokenizer
        self.control = control
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._normalizer = backend.normalizer if backend is not None else None
        # Those are looked for after the normaliser, which may make one of other characters.
        self._after_normalizer = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if self._normalizer is not None
            and token.normalized
            and control.fullmatch(token.content)
        }
        self.writes_all = self._lost(PROBE) is None

    def __call__(self, text: str) -> None:
        """Check a text, quoted as in `encode_quoted`.

        Raises:
            RowError: a character has no token, or the normaliser makes a control token.
        """
        if self.writes_all and not self._after_normalizer:
            return
        made = self._after_normalizer.intersection(encode_quoted(self.tokenizer, text))
        if made:
            token = self.tokenizer.convert_ids_to_tokens(min(made))
            raise RowError(
                f"the tokenizer's normaliser makes its control token {token} of other characters;"
                " take them out of the row"
            )
        lost = None if self.writes_all else self._lost(text)
        if lost is not None:
            raise RowError(
                f"the tokenizer has no token for U+{ord(lost):04X}; take it out of the row, or use"
                " a model whose tokenizer has"
            )

    def _lost(self, text: str) -> str | None:
        """The first character that the tokens of a text do not give back, white space aside."""
        ids = encode_quoted(self.tokenizer, text)
        plain = unmark(text)
        wanted = self._normalizer.normalize_str(plain) if self._normalizer is not None else plain
        found = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        wanted, found = ("".join(t.split()) for t in (wanted, str(found)))
        if wanted == found:
            return None
        same = next(
            (n for n, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), len(found)
        )
        return wanted[same] if same < len(wanted) else wanted[-1:] or None
