"""Layers, attention and MLP blocks are found by structure and weights counted; activation
checkpointing and compilation do not change results.
"""

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
)

from temper.errors import TemperError
from temper.models.blocks import (
    attention_blocks,
    checkpoint_activations,
    count_weights,
    decoder_layers,
    mlp_blocks,
    undecayed_weights,
)
from tests.models.networks import LORA, SHAPE, build, disturb, gradients, logits, save_base

SMALL = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = GPT2Config(
    vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL), "LlamaAttention", "LlamaMLP"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL), "Qwen2Attention", "Qwen2MLP"),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SMALL, head_dim=8),
        "Gemma2Attention",
        "Gemma2MLP",
    ),
    "phi": (PhiForCausalLM, PhiConfig(**SMALL), "PhiAttention", "PhiMLP"),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SMALL, num_local_experts=2),
        "MixtralAttention",
        "MixtralSparseMoeBlock",
    ),
    "gpt2": (GPT2LMHeadModel, GPT2, "GPT2Attention", "GPT2MLP"),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL), "GPTNeoXAttention", "GPTNeoXMLP"),
    "falcon": (FalconForCausalLM, FalconConfig(**SMALL), "FalconAttention", "FalconMLP"),
    "bloom": (
        BloomForCausalLM,
        BloomConfig(vocab_size=20, hidden_size=16, n_layer=3, n_head=2),
        "BloomAttention",
        "BloomMLP",
    ),
    "mpt": (
        MptForCausalLM,
        MptConfig(vocab_size=20, d_model=16, n_layers=3, n_heads=2),
        "MptAttention",
        "MptMLP",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_attention_and_mlp_are_found_in_order(name: str):
    kind, config, attention, mlp = MODELS[name]
    network = kind(config)
    ran: list[nn.Module] = []
    found = [decoder_layers(network), attention_blocks(network), mlp_blocks(network)]
    assert [len(blocks) for blocks in found] == [3, 3, 3]
    assert [type(blocks[0]).__name__ for blocks in found[1:]] == [attention, mlp]
    for module in {*found[1], *found[2]}:
        module.register_forward_hook(lambda module, *_: ran.append(module))
    network(input_ids=torch.tensor([[1, 5, 2]]))
    assert [m for m in ran if m in found[1]] == found[1]
    assert [m for m in ran if m in found[2]] == found[2]
    for layer, *blocks in zip(*found, strict=True):
        assert all(block in list(layer.children()) for block in blocks)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_attention_output_is_added_to_the_residual_stream(name: str):
    kind, config, *_ = MODELS[name]
    network = kind(config)
    shapes = []
    for block in attention_blocks(network):
        block.register_forward_hook(
            lambda _m, _i, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
        )
    network(input_ids=torch.tensor([[1, 5, 2], [1, 6, 2]]))
    assert shapes == [(2, 3, 16)] * 3


def test_an_adapter_around_a_model_does_not_hide_its_layers():
    from peft import LoraConfig, get_peft_model

    network = LlamaForCausalLM(MODELS["llama"][1])
    layers = decoder_layers(network)
    adapted = get_peft_model(
        network, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert decoder_layers(adapted) == layers
    assert any("lora_" in name for name, _ in attention_blocks(adapted)[0].named_parameters())


def test_a_model_without_attention_is_refused():
    network = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(
        TemperError,
        match=(
            r"model\.init_args\.network: MambaForCausalLM has 0 lists of layers with attention"
            r" blocks"
        ),
    ):
        decoder_layers(network)


def test_a_model_with_two_stacks_is_refused():
    network = nn.ModuleList([LlamaForCausalLM(MODELS["llama"][1]), GPT2LMHeadModel(GPT2)])
    with pytest.raises(TemperError, match="ModuleList has 2 lists"):
        attention_blocks(network)


def test_layers_without_one_mlp_block_are_refused():
    network = OPTForCausalLM(
        OPTConfig(
            vocab_size=20, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
        )
    )
    assert len(attention_blocks(network)) == 2
    with pytest.raises(
        TemperError,
        match=r"OPTDecoderLayer has 0 MLP blocks among its submodules \(self_attn, .*fc1, fc2",
    ):
        mlp_blocks(network)


# -- counting weights


def test_weights_are_counted_and_so_are_sharded_ones():
    layer = nn.Linear(3, 4)
    assert count_weights(layer.parameters()) == 16
    layer.weight.ds_numel = 12
    layer.weight.data = torch.empty(0)  # as DeepSpeed ZeRO-3 shards them
    assert count_weights(layer.parameters()) == 16


def test_4_bit_weights_count_each(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base")
    plain = build(base, lora=LORA)
    quantized = build(base, lora=LORA, quantization="nf4")
    assert (
        count_weights(quantized.parameters())
        == count_weights(plain.parameters())
        == sum(p.numel() for p in plain.parameters())
    )
    assert sum(p.numel() for p in quantized.parameters()) < count_weights(quantized.parameters())


# -- activation checkpointing and compilation


@pytest.mark.parametrize("lora", [None, LORA])
def test_activation_checkpointing_gives_the_same_gradients(lora):
    plain = build(lora=lora)
    checkpointed = build(lora=lora, activation_checkpointing=True)
    for network in (plain, checkpointed):
        disturb(network)
    wanted = gradients(plain)
    found = gradients(checkpointed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_activation_checkpointing_reruns_layers_in_backward():
    def passes(network: torch.nn.Module) -> int:
        count = []
        handle = network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.append(1))
        gradients(network)
        handle.remove()
        return len(count)

    assert passes(build()) == 1
    assert passes(build(activation_checkpointing=True)) == 2


def test_models_without_activation_checkpointing_are_refused():
    with pytest.raises(
        TemperError,
        match="activation_checkpointing=true: Linear does not support it; set it to false",
    ):
        checkpoint_activations(torch.nn.Linear(1, 1))


@pytest.fixture
def quick_compiler(monkeypatch) -> Iterator[None]:
    """torch.compile without its C++ compiler, which takes minutes."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True


def test_compiled_layers_keep_parameter_names_and_gradients(quick_compiler):
    network = build()
    compiled = build(compile=True)
    assert compiled.state_dict().keys() == network.state_dict().keys()
    calls = _count_compiled_calls(compiled)
    wanted = gradients(network)
    found = gradients(compiled)
    assert calls == [1] * SHAPE.n_layers
    assert all(torch.allclose(wanted[name], found[name], atol=1e-5) for name in wanted)
    copied = copy.deepcopy(compiled)
    assert torch.allclose(logits(copied), logits(network), atol=1e-5)


def _count_compiled_calls(network: torch.nn.Module) -> list[int]:
    """Record a 1 for every call of a compiled layer."""
    calls: list[int] = []
    for layer in network.model.layers:
        compiled = layer._compiled_call_impl

        def call(*arguments, _compiled=compiled, **settings):
            calls.append(1)
            return _compiled(*arguments, **settings)

        layer._compiled_call_impl = call
    return calls


def test_hooks_set_after_compilation_are_called(quick_compiler):
    network = build(compile=True)
    before = logits(network)
    handle = attention_blocks(network)[0].register_forward_hook(
        lambda module, inputs, output: (output[0] + 1, *output[1:])
    )
    assert not torch.allclose(logits(network), before, atol=1e-3)
    handle.remove()
    assert torch.equal(logits(network), before)


@pytest.mark.slow
def test_full_compilation_trains_checkpointed_adapters():
    torch._dynamo.reset()
    network, compiled = (
        disturb(build(lora=LORA, compile=flag, activation_checkpointing=flag))
        for flag in (False, True)
    )
    wanted = gradients(network)
    found = gradients(compiled)
    assert all(torch.allclose(wanted[name], found[name], atol=1e-4) for name in wanted)
    assert torch.allclose(logits(compiled), logits(network), atol=1e-5)


# -- weights without decay


@pytest.mark.parametrize(
    "network",
    [
        lambda: GPT2LMHeadModel(GPT2),
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
        lambda: PhiForCausalLM(PhiConfig(**SMALL)),
        lambda: build(lora=LORA),
    ],
)
def test_weights_without_decay_are_those_of_the_trainer(network):
    network = network()
    decayed = Trainer.get_decay_parameter_names(None, network)  # it reads nothing of itself
    names = {name for name, _ in network.named_parameters()}
    assert undecayed_weights(network) == names - set(decayed)
    assert 0 < len(undecayed_weights(network)) < len(names)
