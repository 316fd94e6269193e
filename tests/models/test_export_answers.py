"""Answers of a run, of its export in plain transformers, and of adapter and base in plain PEFT."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from temper.errors import TemperError
from temper.models import LoRASpec, NetworkSpec, build_network
from temper.models.lora import is_adapted
from temper.models.run_export import ExportSettings, export_module
from tests.models.networks import TOKENIZER, disturb

V = len(TOKENIZER)
ATTENTION = ["q_proj", "v_proj"]
ALL_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEAD = ["q_proj", "lm_head"]
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.25,
    "max_position_embeddings": 128,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
N_TOKENS = 16
PROMPTS = torch.randint(3, V, (16, 6), generator=torch.Generator().manual_seed(7))
DATA = SimpleNamespace(
    tokenizer=TOKENIZER,
    max_new_tokens=N_TOKENS,
    stop_ids=None,
    eval_rows={"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS)},
)


def _save(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | IDS | settings)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """Folders of a network with tied output layer (True) and without."""
    folder = tmp_path_factory.mktemp("bases")
    return {tied: _save(folder / str(tied), tie_word_embeddings=tied) for tied in (True, False)}


def _found(base: Path, folder: Path, **settings: object) -> Path:
    """A folder with a trained adapter on a base, as plain PEFT saves it."""
    network = AutoModelForCausalLM.from_pretrained(base)
    arguments = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    adapted = disturb(get_peft_model(network, LoraConfig(**arguments)), seed=5)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.manual_seed(3)) * 0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _run(path: Path, seed: int = 0, **settings: object) -> SimpleNamespace:
    """A module whose adapters, or all weights, were trained: moved at random."""
    spec = NetworkSpec(path=str(path), **settings)  # type: ignore[arg-type]
    torch.manual_seed(0)  # new adapters begin at random
    network = build_network(spec, TOKENIZER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                size = 0.3 if "lora_" in name else 0.02
                weight.add_(size * torch.randn(weight.shape, generator=generator))
    return SimpleNamespace(network=network, network_spec=spec)


@torch.no_grad()
def _answers(network) -> list[list[int]]:
    """Greedy answers by full forward passes: nothing of this project, and no cache."""
    network = network.eval()
    ids = PROMPTS
    for _ in range(N_TOKENS):
        ids = torch.cat([ids, network(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    answers = ids[:, PROMPTS.shape[1] :].tolist()
    return [answer[: answer.index(2) if 2 in answer else None] for answer in answers]


def _check(module, folder: Path, forms=(None, False), **settings: object) -> None:
    """Every form of an export answers as the run does, in plain transformers or PEFT."""
    expected = _answers(module.network)
    assert len({tuple(answer) for answer in expected}) > 8, "answers tell networks apart"
    weights = {name: value.clone() for name, value in module.network.state_dict().items()}
    for merge in forms:
        target = folder / f"merge_{merge}"
        form = export_module(module, DATA, target, ExportSettings(merge=merge, **settings))
        if form == "adapter":
            loaded = AutoPeftModelForCausalLM.from_pretrained(target)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(target)
            assert not (target / "adapter_config.json").exists()
        whole = "merged" if is_adapted(module.network) else "whole"
        assert form == ("adapter" if merge is False else whole) and _answers(loaded) == expected
        again = build_network(NetworkSpec(path=str(target)), TOKENIZER)
        assert _answers(again) == expected, "the next stage starts where this one ended"
        card = (target / "README.md").read_text()
        assert "Checked by greedy answers to 16 evaluation prompts, of at most 16 tokens" in card
        assert "all are the same, token for token" in card
    state = module.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_network_answers_as_the_run(bases, tied, tmp_path):
    _check(_run(bases[tied]), tmp_path, forms=(None,))


TARGETS = [ATTENTION, ALL_ATTENTION, HEAD, "all-linear"]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_adapter_answers_as_the_run(bases, tied, targets, tmp_path):
    module = _run(bases[tied], lora=LoRASpec(rank=2, targets=targets))
    _check(module, tmp_path)


FOUND = {
    "q, v": {"target_modules": ATTENTION},
    "q, k, v, o": {"target_modules": ALL_ATTENTION},
    "output layer": {"target_modules": HEAD},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
    "rank-stabilised": {"target_modules": ATTENTION, "use_rslora": True},
}
MORE = {
    "DoRA": {"target_modules": ATTENTION, "use_dora": True},
    "ranks": {"target_modules": ALL_ATTENTION, "rank_pattern": {"q_proj": 3}},
    "scales": {"target_modules": ATTENTION, "alpha_pattern": {"v_proj": 1}},
    "whole output layer": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "whole embeddings": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [5, 6, 7]},
}


# Found adapter, tied output layer, targets of the adapter that follows.
EVERY = list(product(FOUND, (True, False), (ATTENTION, ALL_ATTENTION, HEAD)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied", "targets"), EVERY, ids=str)
def test_found_adapters_answer_alike_by_every_policy(bases, kind, tied, targets, tmp_path):
    """Continued, merged, or kept beside a new one; each exported merged and as an adapter."""
    path = _found(bases[tied], tmp_path / "found", **FOUND[kind])
    plain = _answers(AutoPeftModelForCausalLM.from_pretrained(path))
    lora = LoRASpec(3, alpha=5, targets=targets)
    for settings in ({}, {"adapter": "merge"}, {"adapter": "new", "lora": lora}):
        network = build_network(NetworkSpec(path=str(path), **settings), TOKENIZER)
        assert _answers(network) == plain, settings
    _check(_run(path), tmp_path / "continued")
    _check(_run(path, adapter="merge"), tmp_path / "full", forms=(None,))
    new = _run(path, adapter="new", lora=lora)
    _check(new, tmp_path / "new")
    # The merged base is in no folder, so its new adapter cannot be exported alone.
    merged = _run(path, adapter="merge", lora=lora)
    _check(merged, tmp_path / "merged", forms=(None,))
    with pytest.raises(TemperError, match="base of the adapter is in no folder"):
        export_module(merged, DATA, tmp_path / "alone", ExportSettings(merge=False))
    assert _answers(merged.network) == _answers(new.network), "the same training, two ways"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("tied", [True, False])
def test_more_than_lora_is_continued_and_merged(bases, tied, kind, tmp_path):
    path = _found(bases[tied], tmp_path / "found", **MORE[kind])
    plain = _answers(AutoPeftModelForCausalLM.from_pretrained(path))
    merged = build_network(NetworkSpec(path=str(path), adapter="merge"), TOKENIZER)
    assert _answers(merged) == plain
    _check(_run(path), tmp_path / "continue")
    with pytest.raises(TemperError, match="cannot be combined with another; use merge"):
        build_network(
            NetworkSpec(path=str(path), adapter="new", lora=LoRASpec(2, targets=ATTENTION)),
            TOKENIZER,
        )


def test_an_adapter_that_cannot_be_merged_is_exported_alone(bases, tmp_path):
    settings = {"target_modules": ATTENTION, "lora_bias": True}  # on layers without biases
    path = _found(bases[False], tmp_path / "found", **settings)
    with pytest.raises(TemperError, match=r"this adapter cannot be merged: .*adapter=continue"):
        build_network(NetworkSpec(path=str(path), adapter="merge"), TOKENIZER)
    module = _run(path)
    with pytest.warns(UserWarning, match="this adapter cannot be merged"):
        form = export_module(module, DATA, tmp_path / "export")
    assert form == "adapter"
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export")
    assert _answers(loaded) == _answers(module.network)
    with pytest.raises(TemperError, match="this adapter cannot be merged"):
        export_module(module, DATA, tmp_path / "merged", ExportSettings(merge=True))


@pytest.mark.parametrize("merge", [None, False])
def test_conv1d_layers_and_tied_gpt2(tmp_path, merge):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=32, **IDS)
    config.initializer_range = 0.25
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    module = _run(tmp_path / "base", lora=LoRASpec(2, targets=["c_attn", "c_proj", "lm_head"]))
    _check(module, tmp_path / "export", forms=(merge,))


# -- 4-bit and 8-bit bases

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # the least that is quantized in whole blocks


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_a_quantized_base_answers_as_the_run(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = _save(tmp_path / "base", **WIDE)
    module = _run(base, quantization=kind, lora=LoRASpec(2, targets=ALL_ATTENTION))
    assert export_module(module, DATA, tmp_path / "x", ExportSettings(merge=False)) == "adapter"
    card = (tmp_path / "x" / "README.md").read_text()
    shown = next(line for line in card.splitlines() if "= BitsAndBytesConfig(" in line)
    names = {"BitsAndBytesConfig": BitsAndBytesConfig, "torch": torch}
    quantized = eval(shown.split(" = ")[1], names)  # as a reader of the card would type it
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config=quantized)
    # On CPUs with AVX512, plain bitsandbytes computes 4-bit products in bfloat16.
    assert _plain_kl(module.network, loaded) < 0.02
    assert "mean KL divergence" in card


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_into_a_dequantized_base_is_measured(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = _save(tmp_path / "base", **WIDE)
    module = _run(base, quantization=kind, lora=LoRASpec(2, targets=ALL_ATTENTION))
    told = ExportSettings(merge=True, max_kl=9.0)
    assert export_module(module, DATA, tmp_path / "x", told) == "merged"
    card = (tmp_path / "x" / "README.md").read_text()
    assert "The base model was quantized" in card
    kl = float(card.split("mean KL divergence ")[1].split()[0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert kl == pytest.approx(_plain_kl(module.network, loaded), rel=0.05, abs=1e-6)
    if kind == "nf4":
        assert kl < 1e-6, "4-bit weights are dequantized in float32 without loss"
        return
    strict = ExportSettings(merge=True, max_kl=kl / 2)
    with pytest.raises(TemperError, match=r"above max_kl=.*set merge=false, or max_kl="):
        export_module(module, DATA, tmp_path / "y", strict)
    assert not (tmp_path / "y").exists()


def _plain_kl(network, other) -> float:
    """KL of other next tokens from a network's along its own answers, one answer at a time."""
    total, n = 0.0, 0
    for prompt, answer in zip(PROMPTS.tolist(), _answers(network), strict=True):
        answer = (answer + [2])[:N_TOKENS]
        ids = torch.tensor([prompt + answer])
        places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            p, q = (one.eval()(input_ids=ids).logits[0, places] for one in (network, other))
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        n += len(answer)
    return total / n
