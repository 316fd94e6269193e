"""Vocabulary, token ids and Hugging Face tokenizer of the synthetic language.

A prompt is ``BOS t1 t2 [t3 t4] SOT text EOT``, a compliant response ``out1 STOP [out2 STOP] EOS``,
a refusal ``NULL EOS``. NULL is a token of its own, so a refusal never looks like an output.

Shapes: `B` prompts, `P` prompt tokens, `R` response tokens; padded on the right with -1.
"""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from temper.synthetic.grammar import PAD
from temper.synthetic.language import Language
from temper.synthetic.prompts import Prompts
from temper.synthetic.spec import LanguageSpec

# -- vocabulary

PAD_ID, BOS, EOS, SOT, EOT, STOP, NULL = range(7)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<sot>", "<eot>", "<stop>", "<null>")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def vocabulary(spec: LanguageSpec) -> list[str]:
    """All tokens in id order: special tokens, letters, base, duplicate and task operators."""
    letters = [
        LETTERS[i] if spec.n_letters <= len(LETTERS) else f"l{i}" for i in range(spec.n_letters)
    ]
    base = [f"<op{i}>" for i in range(spec.n_base_operators)]
    duplicates = [f"<dup{i}>" for i in range(spec.n_duplicates)]
    tasks = [f"<task{i}>" for i in range(spec.n_task_operators)]
    return [*SPECIAL, *letters, *base, *duplicates, *tasks]


# -- token ids of prompts and responses


def prompt_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of prompts, ``B x P``."""
    column = np.ones((len(prompts), 1), dtype=np.int64)
    operators = prompts.operators_BO + len(SPECIAL) + language.spec.n_letters
    letters = _letter_tokens(prompts.texts.letters_BT)
    return join_padded([column * BOS, operators, column * SOT, letters, column * EOT])


def compliance_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of responses that apply the operators, ``B x R``."""
    column = np.ones((len(prompts), 1), dtype=np.int64)
    text = prompts.texts.letters_BT
    columns = []
    for pair in range(language.spec.n_pairs):
        text = language.apply_operators(text, prompts.operators_BO[:, 2 * pair : 2 * pair + 2])
        columns += [_letter_tokens(text), column * STOP]
    return join_padded([*columns, column * EOS])


def refusal_tokens(prompts: Prompts) -> np.ndarray:
    """Token ids of responses that refuse, ``B x 2``."""
    return np.tile(np.array([NULL, EOS]), (len(prompts), 1))


def _letter_tokens(letters_BT: np.ndarray) -> np.ndarray:
    return np.where(letters_BT == PAD, PAD, letters_BT + len(SPECIAL))


def join_padded(columns: list[np.ndarray]) -> np.ndarray:
    """Concatenate right-padded arrays along each row and move all padding to the right end."""
    joined = np.concatenate(columns, axis=1)
    order = np.argsort(joined == PAD, axis=1, kind="stable")
    aligned = np.take_along_axis(joined, order, 1)
    width = int((aligned != PAD).sum(axis=1).max(initial=1))
    return aligned[:, :width]


# -- tokenizer


def build_tokenizer(spec: LanguageSpec) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer with the ids of `vocabulary`.

    Tokens are separated by spaces: ``<bos> <op3> <op0> <sot> a b c <eot>``. Saved with
    ``save_pretrained``, it loads with ``AutoTokenizer.from_pretrained``.
    """
    tokens = vocabulary(spec)
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos, *others = SPECIAL
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=pad,
        additional_special_tokens=others,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
