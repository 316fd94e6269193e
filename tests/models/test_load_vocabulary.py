"""Vocabulary check: tokenizers that fit a network are accepted, others refused."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.errors import TemperError
from temper.models import NetworkSpec, build_network

WORDS = ["<pad>", "<s>", "</s>", "a", "b", "ab", " "]


def _tokenizer(model: object, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>", **special
    )


def _bpe(words: list[str] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    return _tokenizer(
        BPE(vocab=vocabulary, merges=[("a", "b")], unk_token=None),
        **({"pad_token": "<pad>"} | special),
    )


def _unigram() -> PreTrainedTokenizerFast:
    return _tokenizer(
        Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=0), pad_token="<pad>"
    )


def _save(folder: Path, tokenizer: PreTrainedTokenizerFast, embeddings: int) -> Path:
    config = LlamaConfig(
        vocab_size=embeddings,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _load(folder: Path, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
    return build_network(NetworkSpec(path=str(folder)), tokenizer)


@pytest.mark.parametrize("make", [_bpe, _unigram])
def test_the_tokenizer_of_the_folder_is_accepted(tmp_path, make):
    folder = _save(tmp_path, make(), 7)
    network = _load(folder, PreTrainedTokenizerFast.from_pretrained(folder))
    assert network.config.vocab_size == 7


def test_a_tokenizer_may_have_added_tokens_with_an_embedding(tmp_path):
    more = _bpe()
    more.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert more.get_vocab()["<turn>"] == 7
    _load(_save(tmp_path / "wide", _bpe(), 8), more)
    with pytest.raises(
        TemperError,
        match=r"\(7 tokens, 7 embeddings\) .*\(8 tokens\), first at token '<turn>'",
    ):
        _load(_save(tmp_path / "narrow", _bpe(), 7), more)


def test_the_networks_own_tokenizer_may_have_extra_tokens(tmp_path):
    """Gemma 3 has an image token, for which its text-only network has no embedding."""
    more = _bpe()
    more.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(more) == 8
    assert _load(_save(tmp_path, more, 7), more).config.vocab_size == 7


@pytest.mark.parametrize(
    ("other", "first"),
    [
        ([*WORDS[:3], "b", "a", *WORDS[5:]], "'[ab]'"),  # the same tokens, two of them swapped
        (WORDS[:6], "' '"),  # one is missing
        ([*WORDS[:6], "c"], "' '"),  # one is replaced
    ],
)
def test_a_token_with_another_id_is_refused(tmp_path, other, first):
    folder = _save(tmp_path, _bpe(), 7)
    with pytest.raises(
        TemperError,
        match=rf"network\.path=.*: its vocabulary .* first at token {first}; ",
    ):
        _load(folder, _bpe(other))


def test_a_pad_token_without_an_embedding_is_refused(tmp_path):
    late = _bpe([*WORDS[1:], "<pad>"])
    folder = _save(tmp_path, late, 6)
    with pytest.raises(
        TemperError,
        match=r"'<pad>' has the id 6, .* 6 embeddings; .*pad_token = tokenizer\.eos_token",
    ):
        _load(folder, late)


def test_a_tokenizer_in_other_files_is_read_by_transformers(tmp_path):
    folder = _save(tmp_path / "a", _bpe(), 8)  # GPT-2's tokenizer adds <|endoftext|>
    shutil.move(folder / "tokenizer.json", tmp_path / "kept.json")
    with pytest.raises(TemperError, match=r"no tokenizer\.json in it; save the tokenizer"):
        _load(folder, _bpe())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<pad>", "pad_token": "<pad>"})
    )
    _load(folder, AutoTokenizer.from_pretrained(folder))
    with pytest.raises(TemperError, match="its vocabulary"):
        _load(folder, _bpe([*WORDS[:6], "c"]))
