"""Small tokenizers, and a minimal datamodule of a few chat rows."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from temper.data import Batch, PoolSource, make_rows, pad_left
from temper.losses import IGNORE_INDEX

SPECIAL = ["<pad>", "<|start|>", "<|end|>"]
WORDS = [
    "You are a helpful kitchen assistant who knows every soup of the world",
    "How do I bake bread at home? Mix flour and water.",
]


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges and special tokens: it encodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
    )


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """Tokens that hold the space before a word, as Llama's: decoded alone, a word loses it."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate(["<pad>", "<s>", "▁one", "▁two", "three"])},
            "<pad>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


class Kitchen:
    """Rows made of texts: a system prompt that all share, a question, an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def prompt(self, question: str) -> list[int]:
        return self.tokenizer.encode(
            f"<|start|>{WORDS[0]}<|end|>\n<|start|>{question}<|end|>\n<|start|>",
            add_special_tokens=False,
        )

    def rows(self, *pairs: tuple[str, str]) -> Batch:
        """Prompt, answer, end; after it a line break that is not trained."""
        prompts = [self.prompt(question) for question, _ in pairs]
        answers = [
            self.tokenizer.encode(f"{answer}<|end|>\n", add_special_tokens=False)
            for _, answer in pairs
        ]
        rows = make_rows(_square(prompts), _square(answers), self.tokenizer.pad_token_id)
        last = rows["attention_mask"].sum(-1) - 1
        rows["labels"][torch.arange(len(pairs)), last] = IGNORE_INDEX
        return rows

    def data(
        self,
        batch_size: int = 1,
        evaluation: tuple[str, ...] = ("How long does rice cook?",),
        **streams: Batch,
    ) -> SimpleNamespace:
        ids = torch.from_numpy(_square([self.prompt(question) for question in evaluation] or [[]]))[
            : len(evaluation)
        ]
        eval_rows = pad_left(ids, ids != -1, self.tokenizer.pad_token_id)
        marks = {"ids": torch.arange(len(ids)), "kind": torch.zeros(len(ids), dtype=torch.long)}
        sources = {name: PoolSource(rows, batch_size, 0, name) for name, rows in streams.items()}
        return SimpleNamespace(
            tokenizer=self.tokenizer,
            sources=sources,
            eval_rows=eval_rows | marks,
            eval_kinds=["safe"],
        )


def _square(rows: list[list[int]]):
    width = max(map(len, rows))
    return (
        torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long)
        .reshape(len(rows), width)
        .numpy()
    )


@pytest.fixture(scope="session")
def kitchen(byte_level: PreTrainedTokenizerFast) -> Kitchen:
    return Kitchen(byte_level)
