"""Attention implementation, activation checkpointing and compilation do not change results."""

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.models.blocks import attention_blocks, checkpoint_activations
from temper.models.load import check_network
from tests.models.networks import LORA, SHAPE, build, disturb, gradients, logits, save_base


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_given_attention_implementation_is_used(tmp_path, attention):
    base = save_base(tmp_path / "base")
    for path in (None, base):
        network = build(path, attention=attention)
        assert network.config._attn_implementation == attention
        assert torch.allclose(logits(network), logits(build(path)), atol=1e-6)


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


# -- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shape": SHAPE, "revision": "v2"},
            r"network\.revision=v2 is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "trust_remote_code": True},
            r"network\.trust_remote_code=True is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "quantization": "nf4", "lora": LORA},
            r"network\.quantization=nf4 is for networks that are loaded",
        ),
        (
            {"shape": SHAPE, "attention": "flash_attention_2"},
            r"attention=flash_attention_2 .*pip install flash-attn, or use sdpa",
        ),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(TemperError, match=message):
        check_network(NetworkSpec(**settings))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has the backward pass")
def test_flex_attention_is_refused_on_a_cpu():
    with pytest.raises(
        TemperError, match="attention=flex_attention has no backward pass on a CPU: use sdpa"
    ):
        check_network(NetworkSpec(shape=SHAPE, attention="flex_attention"))


def test_flash_attention_in_32_bits_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(
        TemperError, match="attention=flash_attention_2 computes in 16 bits: set dtype=bfloat16"
    ):
        check_network(NetworkSpec(shape=SHAPE, attention="flash_attention_2"))
