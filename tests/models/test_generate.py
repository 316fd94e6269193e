"""Greedy generation in batches equals one prompt at a time, and finished rows leave the batch."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from temper.data import pad_left
from temper.models import NetworkSpec, ShapeSpec, generate
from temper.models.end_tokens import cut_at_end, end_tokens
from temper.models.generate import generate_greedy

PAD = 0
STOP = 2
V = 24
STOPS = [STOP, 5, 9, 13]  # enough tokens for answers to end at different lengths
LENGTHS = [4, 7, 2, 5, 3, 6, 8, 1, 4, 5, 6, 7]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": V,
}


def _network(kind=LlamaForCausalLM, config=LlamaConfig, **arguments):
    torch.manual_seed(0)
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": STOP}
    network = (
        kind(
            config(**SHAPE, **tokens, initializer_range=0.6, tie_word_embeddings=False, **arguments)
        )
        .double()
        .eval()
    )
    network.generation_config.pad_token_id = PAD
    return network


NETWORK = _network()


def _prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, V, (len(lengths), max(lengths)), generator=generator)
    present = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows = pad_left(ids, present, PAD)
    return rows["input_ids"], rows["attention_mask"]


def _generate_one_by_one(network, ids, mask, max_new_tokens, ends):
    """Answers by full forward passes, one prompt at a time, without cache or padding."""
    answers = []
    for row, present in zip(ids, mask.bool(), strict=True):
        tokens = row[present].tolist()
        answer = []
        with torch.no_grad():
            while len(answer) < max_new_tokens and not (answer and answer[-1] in ends):
                answer.append(int(network(torch.tensor([tokens + answer])).logits[0, -1].argmax()))
        answers.append(answer)
    return answers


def _unpad(answers_BR, answers):
    """Answers without padding; everything after an answer must be padding."""
    for row, answer in zip(answers_BR.tolist(), answers, strict=True):
        assert set(row[len(answer) :]) <= {PAD}
    assert answers_BR.shape[1] == max(map(len, answers))
    return [row[: len(answer)] for row, answer in zip(answers_BR.tolist(), answers, strict=True)]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    seed=st.integers(0, 50),
    max_new_tokens=st.integers(1, 30),
)
def test_a_batch_gives_the_answers_of_one_prompt_at_a_time(lengths, seed, max_new_tokens):
    ids, mask = _prompts(lengths, seed)
    expected = _generate_one_by_one(NETWORK, ids, mask, max_new_tokens, STOPS)
    assert _unpad(generate_greedy(NETWORK, ids, mask, max_new_tokens, STOPS), expected) == expected


def test_the_output_layer_multiplies_dense_rows():
    """A strided last position would be multiplied with the output weights once per row."""
    network = _network()
    seen = []
    network.lm_head.register_forward_hook(
        lambda head, inputs, logits: seen.append(
            (tuple(inputs[0].shape), inputs[0].is_contiguous())
        )
    )
    ids, mask = _prompts(LENGTHS)
    generate_greedy(network, ids, mask, 3, STOPS)
    assert seen[0] == ((len(LENGTHS), 1, SHAPE["hidden_size"]), True)
    assert not network.lm_head._forward_pre_hooks, "the hook is removed"


def _count_rows(monkeypatch, network):
    """Record the number of rows of every forward pass."""
    rows = []
    forward = network.forward
    monkeypatch.setattr(
        network, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or forward(*a, **k)
    )
    return rows


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    ids, mask = _prompts(LENGTHS, seed=2)
    expected = _generate_one_by_one(NETWORK, ids, mask, 40, STOPS)
    lengths = sorted(map(len, expected))
    assert lengths[0] < 20 < lengths[-1], "answers must differ in length"
    rows = _count_rows(monkeypatch, NETWORK)
    assert _unpad(generate_greedy(NETWORK, ids, mask, 40, STOPS), expected) == expected
    needed = sum(lengths)
    assert (
        needed <= sum(rows) < 12 * lengths[-1] * 0.8
        and rows[0] == 12
        and rows == sorted(rows, reverse=True)
    )
    monkeypatch.setattr(generate, "FINISHED_SHARE", 2.0)
    kept = _count_rows(monkeypatch, NETWORK)
    generate_greedy(NETWORK, ids, mask, 40, STOPS)
    assert kept == [12] * lengths[-1]


def test_rows_leave_the_batch_with_sliding_window_attention_too(monkeypatch):
    network = _network(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        head_dim=8,
        num_key_value_heads=1,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )
    ids, mask = _prompts(LENGTHS)
    ends = [10, 11, 12, 13]
    expected = _generate_one_by_one(network, ids, mask, 30, ends)
    rows = _count_rows(monkeypatch, network)
    assert _unpad(generate_greedy(network, ids, mask, 30, ends), expected) == expected
    assert rows[0] == 12 and rows[-1] == 1


def test_the_stop_token_of_the_generation_config_is_the_default():
    ids, mask = _prompts([3, 5], seed=2)
    assert torch.equal(
        generate_greedy(NETWORK, ids, mask, 30), generate_greedy(NETWORK, ids, mask, 30, [STOP])
    )


def test_every_answer_may_be_as_long_as_allowed():
    ids, mask = _prompts([3, 5, 4], seed=2)
    answers = generate_greedy(NETWORK, ids, mask, 25, [])
    assert answers.shape == (3, 25) and answers.tolist() == _generate_one_by_one(
        NETWORK, ids, mask, 25, []
    )


# What generation_config.json of published models has, each enough to change greedy answers.
SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 12,
    "min_length": 18,
    "num_beams": 4,
    "bad_words_ids": [[7], [8], [9], [10]],
    "suppress_tokens": [6, 7, 8, 9, 10, 11, 12],
    "begin_suppress_tokens": [6, 7, 8, 9, 10, 11, 12, 20, 21, 22, 23],
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (1, 9.0),
    "sequence_bias": {(7,): 50.0},
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": "x",
    "max_time": 1e-9,
    "num_return_sequences": 3,
    "do_sample": True,
    "return_dict_in_generate": False,
    "max_length": 5,
    "use_cache": False,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_is_greedy_whatever_the_generation_config_says(name):
    network = copy.deepcopy(NETWORK)
    setattr(network.generation_config, name, SETTINGS[name])
    own = network.generation_config
    before = own.to_dict()
    ids, mask = _prompts([3, 5, 4, 6], seed=2)
    expected = _generate_one_by_one(NETWORK, ids, mask, 20, STOPS)
    generate._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [generate_greedy(network, ids, mask, 20, STOPS) for _ in range(2)]
    assert _unpad(found[0], expected) == expected and torch.equal(*found)
    said = [str(one.message) for one in caught if "set aside" in str(one.message)]
    chooses = name not in generate.NOT_DECODING
    assert len(said) == chooses and all(f"{name}=" in text for text in said)
    assert network.generation_config is own and own.to_dict() == before


def test_adapted_networks_are_greedy_too():
    network = copy.deepcopy(NETWORK)
    network.generation_config.repetition_penalty = 5.0
    config = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(network, config).double()
    ids, mask = _prompts([3, 5, 4, 6], seed=2)
    expected = _generate_one_by_one(NETWORK, ids, mask, 20, STOPS)
    assert _unpad(generate_greedy(adapted, ids, mask, 20, STOPS), expected) == expected
    assert network.generation_config.repetition_penalty == 5.0


def test_plain_configs_are_not_remarked_upon():
    plain = {"do_sample": False, "temperature": 1.0, "repetition_penalty": 1.0, "num_beams": 1}
    config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], max_length=99, **plain)
    assert generate.set_aside(config) == []
    config.temperature = 0.6
    config.bad_words_ids = [[i] for i in range(99)]
    found = generate.set_aside(config)
    assert found[0].startswith("temperature=0.6") or found[1].startswith("temperature=0.6")
    assert len(found) == 2 and max(map(len, found)) < 90


def test_all_end_tokens_of_a_network_and_its_data():
    network = copy.deepcopy(NETWORK)
    network.generation_config.eos_token_id = [9, 5]
    assert end_tokens(network) == [9, 5], "2 is the default of Llama's config, and no one's choice"
    network.config.eos_token_id = 13
    assert end_tokens(network, [7, 5]) == [7, 5, 9, 13]
    network.config.eos_token_id = [13, 14]
    network.generation_config.eos_token_id = None
    assert end_tokens(network) == [13, 14] and end_tokens(None, [3]) == [3]


def test_an_answer_ends_at_any_of_its_end_tokens():
    assert cut_at_end([4, 6, 9, 4, 5], [5, 9]) == [4, 6]
    assert cut_at_end([4, 6], [5]) == [4, 6] and cut_at_end([5, 4], [5]) == []


def test_activation_checkpointing_and_training_use_the_cache(monkeypatch):
    network = copy.deepcopy(NETWORK)
    network.gradient_checkpointing_enable()
    network.config.use_cache = False
    network.train()
    ids, mask = _prompts([3, 5, 4], seed=2)
    widths = []
    forward = network.forward
    monkeypatch.setattr(
        network,
        "forward",
        lambda *a, **k: widths.append(k["input_ids"].shape[1]) or forward(*a, **k),
    )
    answers = generate_greedy(network, ids, mask, 12, [])
    assert widths == [5] + [1] * 11, "one token per pass after the first"
    assert answers.tolist() == _generate_one_by_one(NETWORK, ids, mask, 12, []) and network.training


def test_training_mode_is_restored_when_generation_fails():
    network = copy.deepcopy(NETWORK).train()
    with pytest.raises(IndexError):
        generate_greedy(
            network, torch.full((1, 3), V), torch.ones(1, 3, dtype=torch.long), 4
        )  # V is not a token id
    assert network.training


def test_a_module_stops_at_the_tokens_of_its_datamodule():
    from lightning_modules import SFTModule

    module = SFTModule(NetworkSpec(shape=ShapeSpec()))
    module.network = NETWORK
    ids, mask = _prompts([3, 5, 4, 6], seed=2)
    module._trainer = SimpleNamespace(
        strategy=None, datamodule=SimpleNamespace(max_new_tokens=20, stop_ids=STOPS)
    )
    found = module.generate({"input_ids": ids, "attention_mask": mask})
    # The datamodule's, and the network's own.
    expected = _generate_one_by_one(NETWORK, ids, mask, 20, STOPS)
    assert _unpad(found, expected) == expected
    module._trainer.datamodule.stop_ids = None
    network = copy.deepcopy(NETWORK)
    network.generation_config.eos_token_id = STOPS
    module.network = network
    assert torch.equal(module.generate({"input_ids": ids, "attention_mask": mask}), found)
    module._trainer.datamodule.stop_ids = STOPS[2:]
    assert torch.equal(module.generate({"input_ids": ids, "attention_mask": mask}), found)
    module.max_new_tokens = 3
    shorter = [row[:3] for row in expected]
    assert _unpad(module.generate({"input_ids": ids, "attention_mask": mask}), shorter) == shorter
