"""The language's tokenizer in Hugging Face format: one readable symbol per token."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from temper.synthetic.spec import LanguageSpec
from temper.synthetic.tokens import SPECIAL, vocabulary


def build_tokenizer(spec: LanguageSpec) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose ids are those of `temper.synthetic.tokens`.

    Tokens are separated by spaces: ``<bos> <op3> <op0> <sot> a b c <eot>``. Saved with
    ``save_pretrained``, it loads with ``AutoTokenizer.from_pretrained``.
    """
    tokens = vocabulary(spec)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
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
