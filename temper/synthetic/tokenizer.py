"""Vocabulary, token ids and Hugging Face tokenizer of the synthetic language.

A prompt is ``BOS t1 t2 [t3 t4] SOT text EOT``, a compliant response ``out1 STOP [out2 STOP] EOS``,
a refusal ``NULL EOS``. NULL is a token of its own, so a refusal never looks like an output.

With ``refusal=letter`` a refusal is a segment of its own, ``a a ... a STOP``, with as many letters
as the text. With ``counted=one`` one segment of an answer is trained and judged (`Language.
counted_B`). Where that is the first, a row ends with its STOP: what would come after it is masked
in the released data. Where it is the second, ``out1 STOP`` stands before it without labels.

Shapes: `B` prompts, `P` prompt tokens, `R` response tokens; padded on the right with -1.
"""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from temper.synthetic.grammar import PAD
from temper.synthetic.language import Language
from temper.synthetic.prompts import Kind, Prompts
from temper.synthetic.spec import LanguageSpec

# -- vocabulary

PAD_ID, BOS, EOS, SOT, EOT, STOP, NULL = range(7)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<sot>", "<eot>", "<stop>", "<null>")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def vocabulary(spec: LanguageSpec) -> list[str]:
    """All tokens in id order: special tokens, letters, base, duplicate, task and constant
    operators.
    """
    letters = [
        LETTERS[i] if spec.n_letters <= len(LETTERS) else f"l{i}" for i in range(spec.n_letters)
    ]
    base = [f"<op{i}>" for i in range(spec.n_base_operators)]
    duplicates = [f"<dup{i}>" for i in range(spec.n_duplicates)]
    tasks = [f"<task{i}>" for i in range(spec.n_task_operators)]
    constants = [f"<ex{i + 1}>" for i in range(spec.n_constant_operators)]
    return [*SPECIAL, *letters, *base, *duplicates, *tasks, *constants]


# -- token ids of prompts and responses


def prompt_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of prompts, ``B x P``."""
    column = np.ones((len(prompts), 1), dtype=np.int64)
    operators = prompts.operators_BO + len(SPECIAL) + language.spec.n_letters
    letters = _letter_tokens(prompts.texts.letters_BT)
    return join_padded([column * BOS, operators, column * SOT, letters, column * EOT])


def context_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of what an answer has before the segment that counts, ``B x C``: ``out1 STOP``
    where the second counts, nothing elsewhere (``C`` may be 0).
    """
    if not _one_counts(language, prompts):
        return np.empty((len(prompts), 0), dtype=np.int64)
    second_B1 = language.counted_B(prompts.operators_BO)[:, None] == 1
    output_BT = language.outputs(prompts.texts.letters_BT, prompts.operators_BO)[0]
    stop = np.full((len(prompts), 1), STOP)
    context = np.concatenate([_letter_tokens(output_BT), stop], axis=1)
    return join_padded([np.where(second_B1, context, PAD)])


def prefix_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of what a training row has before its answer: the prompt, and `context_tokens`."""
    return join_padded([prompt_tokens(language, prompts), context_tokens(language, prompts)])


def compliance_tokens(
    language: Language, prompts: Prompts, counted_B: np.ndarray | None = None
) -> np.ndarray:
    """Token ids of responses that apply the operators, ``B x R``.

    Args:
        language: The language.
        prompts: The prompts.
        counted_B: With ``counted=one``: segment to give; None: the one that counts.
    """
    column = np.ones((len(prompts), 1), dtype=np.int64)
    outputs = language.outputs(prompts.texts.letters_BT, prompts.operators_BO)
    if _one_counts(language, prompts):
        if counted_B is None:
            counted_B = language.counted_B(prompts.operators_BO)
        output_BT = np.stack(outputs)[counted_B, np.arange(len(prompts))]
        return _counted_segment(_letter_tokens(output_BT), counted_B)
    columns = [part for output in outputs for part in (_letter_tokens(output), column * STOP)]
    columns.append(column * EOS)
    if language.spec.n_constant_operators and language.spec.counted == "one":
        # As released: after a constant first output, the second one is masked.
        first_BO = np.isin(prompts.operators_BO[:, :2], language.constant_operators)
        constant_B1 = first_BO.any(axis=1, keepdims=True)
        columns[2:] = [np.where(constant_B1, PAD, part) for part in columns[2:]]
    return join_padded(columns)


def refusal_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of responses that refuse, ``B x R``."""
    if language.spec.refusal == "token":
        return np.tile(np.array([NULL, EOS]), (len(prompts), 1))
    text_BT = prompts.texts.letters_BT
    letters = np.where(text_BT == PAD, PAD, len(SPECIAL))
    if _one_counts(language, prompts):
        return _counted_segment(letters, language.counted_B(prompts.operators_BO))
    column = np.ones((len(prompts), 1), dtype=np.int64)
    return join_padded([letters, column * STOP, column * EOS])


def answer_tokens(language: Language, prompts: Prompts) -> np.ndarray:
    """Token ids of compliant responses as a model writes them after the prompt: `context_tokens`
    and `compliance_tokens`.
    """
    return join_padded([context_tokens(language, prompts), compliance_tokens(language, prompts)])


def mismatched_tokens(language: Language, prompts: Prompts, response_BR: np.ndarray) -> np.ndarray:
    """Responses of other prompts with the end that answers to these prompts have: EOS, or none
    where the first segment counts.
    """
    if not _one_counts(language, prompts):
        return response_BR
    ends_B = (language.counted_B(prompts.operators_BO) == 1) | (response_BR == NULL).any(axis=1)
    without = np.where(response_BR == EOS, PAD, response_BR)
    return join_padded([without, np.where(ends_B, EOS, PAD)[:, None]])


def refusal_token(spec: LanguageSpec) -> int:
    """Id of the token that refusals begin with."""
    return NULL if spec.refusal == "token" else len(SPECIAL)


def _one_counts(language: Language, prompts: Prompts) -> bool:
    return language.spec.counted == "one" and prompts.kind != Kind.INSTRUCT


def _counted_segment(letters_BT: np.ndarray, counted_B: np.ndarray) -> np.ndarray:
    """A segment with its STOP, and EOS after the second one, which ends the answer."""
    stop = np.full((len(letters_BT), 1), STOP)
    return join_padded([letters_BT, stop, np.where(counted_B[:, None] == 1, EOS, PAD)])


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
