"""Layers, attention and MLP blocks are found by structure; weights are counted in full."""

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
)

from temper.errors import TemperError
from temper.models.blocks import attention_blocks, count_weights, decoder_layers, mlp_blocks
from tests.models.networks import LORA, build, save_base

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
