"""Tiny judge models in folders, with one token per word and random weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = (
    "soup",
    "bread",
    "cake",
    "please",
    "bake",
    "boil",
    "sorry",
    "no",
    "yes",
    "safe",
    "unsafe",
    "User:",
    "Agent:",
    "Verdict:",
    "with",
    "in",
    "the",
    "oven",
    "pot",
)

# A chat template that names the speakers.
CHAT = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Agent: ' }}{{ m.content }} {%"
    " endfor %}Verdict:"
)


def words_tokenizer(
    template: str | None = None, words: Sequence[str] = WORDS
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; unknown words are ``<unk>``."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
    )
    tokenizer.chat_template = template
    return tokenizer


def config(**arguments: object) -> LlamaConfig:
    """Config of a decoder with a few hundred weights."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(WORDS) + 4,
    }
    return LlamaConfig(
        **shape, initializer_range=1.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, **arguments
    )


def classifier_folder(folder: Path, **arguments: object) -> Path:
    """Save a sequence classifier; return its folder."""
    torch.manual_seed(0)
    LlamaForSequenceClassification(config(**arguments)).save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


def lm_folder(folder: Path, template: str | None = None) -> Path:
    """Save a causal LM; return its folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    words_tokenizer(template).save_pretrained(folder)
    return folder
