"""What is found by trying: logits that are changed, and packed sequences that see each other."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from temper.models.tries import changed_logits, isolates_packed_sequences

COMMON = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = COMMON | {"intermediate_size": 16, "num_key_value_heads": 1}
MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.015625}
# Hybrids of attention and a recurrence: attention keeps packed sequences apart, the rest does not.
STATE = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}


def _network(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def _tried(network: Any) -> str | None:
    decoder = getattr(network, network.base_model_prefix)
    return changed_logits(network, decoder, network.get_output_embeddings())


AFTER = "caps, scales or masks its logits after its output layer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LlamaConfig(**TINY), None),
        (Qwen2Config(**TINY, tie_word_embeddings=True), None),
        (GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2), None),
        (BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2), None),
        (Gemma3TextConfig(**TINY, head_dim=8), None),
        (GraniteConfig(**TINY, **MULTIPLIERS, logits_scaling=1.0), None),
        (GraniteConfig(**TINY, logits_scaling=8.0), AFTER),
        (Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=30.0), AFTER),
        (CohereConfig(**TINY, logit_scale=0.0625), AFTER),
        (Cohere2Config(**TINY, logit_scale=0.25), AFTER),
        (FalconH1Config(**TINY, **STATE, lm_head_multiplier=0.04), AFTER),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_caps_and_scales_of_logits_are_found(config, found, dtype):
    network = _network(config, dtype)
    assert _tried(network) == found
    assert network.training and not network.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda out: out * 1.01, AFTER),
        (lambda out: out + torch.linspace(0, 1, 20), AFTER),
        (lambda out: 50 * torch.tanh(out / 50), AFTER),
        (lambda out: out.index_fill(-1, torch.tensor([3]), -1e9), AFTER),
        (lambda out: out.log_softmax(-1), AFTER),
        (lambda out: out[..., :10], "computes its logits in a way of its own"),
        (lambda out: out, None),
    ],
)
def test_any_change_after_the_output_layer_is_found(change, found):
    network: Any = _network(LlamaConfig(**TINY))
    honest = network.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        out = honest(*args, **inputs)
        out.logits = change(out.logits)
        return out

    network.forward = forward
    assert _tried(network) == found


def test_a_hook_on_the_output_layer_is_found():
    network: Any = _network(LlamaConfig(**TINY))
    network.lm_head.register_forward_hook(lambda _head, _inputs, out: 30 * (out / 30).tanh())
    assert _tried(network) == AFTER


def test_hidden_states_scaled_before_the_output_layer_are_found():
    network: Any = _network(LlamaConfig(**TINY))
    network.lm_head.register_forward_pre_hook(lambda _head, inputs: (inputs[0] / 4,))
    assert _tried(network) == "scales or changes hidden states before its output layer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (LlamaConfig(**TINY), True),
        (GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2), True),
        (Gemma3TextConfig(**TINY, head_dim=8, sliding_window=3), True),
        (GraniteConfig(**TINY, **MULTIPLIERS, residual_multiplier=0.22), True),
        (MixtralConfig(**TINY, num_local_experts=4), True),
        (BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2), False),
        (MambaConfig(**{k: v for k, v in COMMON.items() if "heads" not in k}), False),
        (FalconH1Config(**TINY, **STATE), False),
        (FalconH1Config(**TINY, **STATE, ssm_out_multiplier=5e-3), False),
        (Lfm2Config(**TINY, layer_types=["conv", "full_attention"]), False),
        (RecurrentGemmaConfig(**TINY, lru_width=16, head_dim=8), False),
        (BambaConfig(**TINY, mamba_n_heads=2, mamba_d_head=16, attn_layer_indices=[1]), False),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_packed_sequences_that_see_each_other_are_found(config, apart, dtype):
    network = _network(config, dtype)
    assert isolates_packed_sequences(network) is apart
    assert network.training


@pytest.mark.parametrize("share", [1.0, 1e-2, 5.6e-4, 1e-5])
def test_the_smallest_leak_between_sequences_is_found(share):
    network: Any = _network(LlamaConfig(**TINY))
    assert isolates_packed_sequences(network)

    def leak(_layer: nn.Module, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        before = out.cumsum(1) - out  # everything before a token, whatever the mask says
        return out + share * before

    network.model.layers[0].mlp.register_forward_hook(leak)
    assert not isolates_packed_sequences(network)


def test_positions_that_do_not_begin_anew_are_found():
    network: Any = _network(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))
    honest = network.transformer.wpe.forward
    length = 6
    network.transformer.wpe.forward = lambda ids: honest(
        ids + length * (torch.arange(ids.shape[-1]) >= length)
    )
    assert not isolates_packed_sequences(network)


def test_a_network_on_which_nothing_shows_is_not_packed():
    network: Any = _network(LlamaConfig(**TINY))
    for layer in network.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not isolates_packed_sequences(network)
