"""Rows and answers longer than the network's positions are refused, or warned of, in one line."""

import warnings
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from transformers import (
    AutoConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
)

from datamodules import TextKTO, TextSupervised
from lightning_modules import SFTModule
from lightning_modules.positions import _longest
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.models.positions import learns_positions, position_limit
from tests.objectives import fit, make_data, make_module
from tests.text import model_folder, write_lines

ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_scaling=ROPE), 256),
        (
            LlamaConfig(
                max_position_embeddings=512,  # as Llama 3.1 has it: stretched already
                rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
                | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
            ),
            512,
        ),
        (
            LlamaConfig(
                max_position_embeddings=64, rope_scaling={"rope_type": "linear", "factor": 2.0}
            ),
            128,
        ),
        (MistralConfig(max_position_embeddings=64, sliding_window=8), 64),
        (Gemma3TextConfig(max_position_embeddings=64, sliding_window=8), 64),
        (GPT2Config(n_positions=32), 32),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(alibi=False, max_position_embeddings=64), 64),
        (MambaConfig(), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_limit_counts_stretched_positions_and_no_windows(config: AutoConfig, limit):
    assert position_limit(config) == limit


def test_a_table_of_positions_is_told_from_rotations():
    small = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTConfig(**small, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=64)
    assert learns_positions(OPTForCausalLM(opt), 64)
    gpt = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    assert learns_positions(GPT2LMHeadModel(gpt), 32)
    llama = LlamaConfig(**small, intermediate_size=8, max_position_embeddings=64)
    assert not learns_positions(LlamaForCausalLM(llama), 64)  # as many words as positions


def _run(module, data, verb="fit", **settings):
    """Warnings of positions in a run of a verb."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if verb == "fit":
            fit(module, data, 1, **settings)
        else:
            trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
            getattr(trainer, verb)(module, datamodule=data)
    return [str(w.message) for w in caught if "positions" in str(w.message)]


@pytest.fixture
def long(tmp_path):
    """``long(kind, ...)``: a module of 48 positions, and data with a row that is longer."""
    folder = model_folder(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 48
    config.save_pretrained(folder)
    said = "flour and milk, " * 20
    rows = [{"prompt": "Soup?", "completion": "Yes.", "label": n % 2 == 0} for n in range(3)]
    rows.append({"prompt": f"Summarise: {said}", "completion": "Cake.", "label": True})
    train = write_lines(tmp_path / "long.jsonl", rows)
    plain = write_lines(tmp_path / "plain.jsonl", [r | {"label": None} for r in rows])
    asked = write_lines(tmp_path / "asked.jsonl", [{"prompt": "Bread?"}])

    def made(kind=TextSupervised, **settings):
        settings = {"max_length": 4096, "max_new_tokens": 4, "batch_size": 2} | settings
        data = kind(
            train=train if kind is TextKTO else plain,
            unsafe=asked,
            tokenizer=str(folder),
            cache=str(tmp_path / "cache"),
            **settings,
        )
        sgd = partial(torch.optim.SGD, lr=0.1)
        return SFTModule(NetworkSpec(path=str(folder)), optimizer=sgd), data

    return made


def test_rows_longer_than_the_positions_are_said_at_the_start(long):
    module, data = long()
    (line,) = _run(module, data)
    longest = data.reports["train"].longest
    assert longest > 48
    assert line.startswith(
        f"data.max_length=4096: the longest row of stream 'train' has {longest} tokens, and"
        " LlamaForCausalLM has 48 positions (max_position_embeddings); give --data.max_length=48"
    )
    assert _run(*long(max_length=48)) == []


def test_mismatched_answers_count_too(long):
    _, data = long(TextKTO)
    data.prepare_data()
    data.setup("fit")
    own = data.reports["train"].longest
    assert _longest(data.sources["kto"], 48) >= own > 48
    assert _longest(data.sources["kto"], 10**6) == own  # no row is read where none can be too long


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_answers_past_the_positions_are_said_at_the_start(long, verb):
    module, data = long(max_length=48, max_new_tokens=60)
    settings = {"limit_val_batches": 1.0} if verb == "fit" else {}
    (line,) = _run(module, data, verb, **settings)
    prompt = int(data.eval_rows["attention_mask"].sum())
    assert line.startswith(
        f"data.max_new_tokens=60: with the longest evaluation prompt ({prompt} tokens) that is"
        f" {prompt + 60} tokens, and LlamaForCausalLM has 48 positions"
    )
    assert f"--data.max_new_tokens={48 - prompt}" in line
    if verb == "fit":
        assert _run(*long(max_length=48, max_new_tokens=60)) == []  # nothing is generated


def test_a_table_of_positions_that_is_too_short_is_refused():
    module = make_module(SFTModule)
    short = GPT2Config(vocab_size=len(make_data().tokenizer), n_embd=16, n_layer=1, n_head=2)
    short.n_positions = 8
    module.network = GPT2LMHeadModel(short).double()
    with pytest.raises(TemperError, match="stream 'alignment' has .* GPT2LMHeadModel has 8 pos"):
        fit(module, make_data(), 1)
