"""Directions in the residual stream: recorded, removed and added, and no trace left behind."""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from temper.models.blocks import decoder_layers
from temper.models.capture import (
    ablated,
    added,
    last_residuals,
    record_inputs,
    record_outputs,
    residual_writes,
    run_prompts,
)
from temper.models.refusal_direction import find_refusal_direction
from tests.models.test_blocks import MODELS, SMALL
from tests.objectives import same_bits, weights

NETWORKS = {name: (kind, config) for name, (kind, config, *_) in MODELS.items()} | {
    "olmo2": (Olmo2ForCausalLM, Olmo2Config(**SMALL)),
    "glm4": (Glm4ForCausalLM, Glm4Config(**SMALL, head_dim=8)),
}
IDS = torch.tensor([[0, 0, 1, 5, 3], [1, 6, 2, 9, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    kind, config = NETWORKS[name]
    network = kind(copy.deepcopy(config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases too
    return network


def norms_of_residuals(network: nn.Module) -> Iterator[nn.Module]:
    """Norms that read the residual stream, and not what a block wrote."""
    writes = set(residual_writes(network))
    for layer in decoder_layers(network):
        for name, child in layer.named_children():
            if ("norm" in name or name.startswith("ln")) and child not in writes:
                yield child


@pytest.mark.parametrize("name", NETWORKS)
def test_the_direction_is_nowhere_in_the_stream(name):
    network = make(name, torch.float32)  # some compute experts in nothing else
    direction = torch.randn(16)
    layers = decoder_layers(network)
    norms = list(norms_of_residuals(network))
    with (
        torch.no_grad(),
        ablated(network, direction),
        record_inputs([*layers, *norms]) as read,
        record_outputs(layers) as written,
    ):
        run_prompts(network, IDS, MASK)
    assert len(read) == len(layers) + len(norms)
    for x in [*read, *written]:
        x = x[MASK.bool()]  # what some write at padding is not a number
        assert (x @ direction).abs().max() < 1e-6 * x.norm() * direction.norm()


def test_ablation_is_orthogonalization_of_what_writes():
    """Section 4.1 of the paper: ``W <- W - r r^T W`` of every matrix that writes to the stream."""
    network = make("llama")
    r = torch.randn(16, dtype=torch.float64)
    unit = r / r.norm()
    edited = copy.deepcopy(network)
    with torch.no_grad():
        embedding = edited.get_input_embeddings().weight
        embedding -= (embedding @ unit)[:, None] * unit
        for layer in decoder_layers(edited):
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix -= unit[:, None] * (unit @ matrix)
    with ablated(network, r):
        found = run_prompts(network, IDS, MASK)
    torch.testing.assert_close(found, run_prompts(edited, IDS, MASK), rtol=1e-10, atol=1e-12)
    assert (found - run_prompts(network, IDS, MASK)).norm() > 0.01


def test_a_vector_added_to_the_first_layer_is_one_on_the_embedding():
    network = make("llama")
    vector = torch.randn(16, dtype=torch.float64)
    edited = copy.deepcopy(network)
    with torch.no_grad():
        edited.get_input_embeddings().weight += vector
    with added(network, 0, vector):
        found = run_prompts(network, IDS, MASK)
    torch.testing.assert_close(found, run_prompts(edited, IDS, MASK), rtol=1e-10, atol=1e-12)


def test_a_vector_is_added_at_its_layer_only():
    network = make("gpt2")
    vector = torch.ones(16, dtype=torch.float64)
    plain = last_residuals(network, IDS, MASK, 2)
    with added(network, 1, vector):
        changed = last_residuals(network, IDS, MASK, 2)
    torch.testing.assert_close(changed[:, 0], plain[:, 0])
    torch.testing.assert_close(changed[:, 1], plain[:, 1] + vector)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
def test_residuals_do_not_depend_on_padding(name):
    network = make(name, torch.float32)
    both = last_residuals(network, IDS, MASK, 2)
    alone = last_residuals(network, IDS[:1, 2:], MASK[:1, 2:], 2)
    assert both.shape == (2, 3, 2, 16)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)
    logits = run_prompts(network, IDS, MASK)
    alone = run_prompts(network, IDS[:1, 2:], MASK[:1, 2:])
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_as_it_was_bit_for_bit(fails):
    network = make("llama", torch.bfloat16)
    before = weights(network)
    logits = run_prompts(network, IDS, MASK)
    network.train()
    ends = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
    with ends, ablated(network, torch.ones(16)), added(network, 1, torch.ones(16)):
        run_prompts(network, IDS, MASK)
        if fails:
            raise ZeroDivisionError
    assert network.training
    assert same_bits(before, weights(network))
    assert torch.equal(logits, run_prompts(network, IDS, MASK))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def planted(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    """A network that refuses (token 3) where the last token of the prompt is 5, and otherwise
    answers (token 4), by one direction of its embeddings.
    """
    config = LlamaConfig(**SMALL | {"num_hidden_layers": 5}, tie_word_embeddings=False)
    torch.manual_seed(0)
    network = LlamaForCausalLM(config).to(dtype)
    r, answer = torch.linalg.qr(torch.randn(16, 2, dtype=dtype)).Q.T
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            parameter.zero_()
        embedding = network.get_input_embeddings().weight
        embedding -= (embedding @ r)[:, None] * r
        embedding[5] = 2 * r + answer
        embedding[6] = answer
        network.lm_head.weight.zero_()
        network.lm_head.weight[3] = 4 * r
        network.lm_head.weight[4] = 2 * answer
    return network, r


def test_a_planted_direction_is_found_and_its_removal_ends_refusal():
    network, r = planted()
    ids = torch.randint(7, 20, (12, 4), generator=torch.Generator().manual_seed(1))
    prompts = {
        kind: {
            "input_ids": torch.cat([ids, torch.full((12, 1), last)], dim=1),
            "attention_mask": torch.ones(12, 5, dtype=torch.long),
        }
        for kind, last in (("unsafe", 5), ("safe", 6))
    }
    found = find_refusal_direction(
        network,
        prompts["unsafe"],
        prompts["safe"],
        [3],
        n_validation=4,
        n_positions=2,
        batch_size=5,
    )
    best = found.selection.best
    assert best is not None and found.direction_D is not None
    assert best.position == -1
    assert torch.cosine_similarity(found.direction_D, r, dim=0) == pytest.approx(1, abs=1e-9)
    assert found.plain > 0 > best.ablated
    assert best.induced > 0 > found.plain_safe
    assert best.kl == pytest.approx(0, abs=1e-12)
    # the other position's prompts are equal, so its difference is zero and its ablation undefined
    assert found.selection.left_out == {"not finite": 4}
