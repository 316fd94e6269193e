"""The forward pass: plain, fused and packed; single and paired rows; left and right padding."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
)

from temper.data import pair_rows
from temper.data.rows import LENGTHS
from temper.errors import TemperError
from temper.losses import nll
from temper.models import LoRASpec, NetworkSpec, ShapeSpec, build_network, score
from temper.models.score import output_layer
from temper.models.tries import isolates_packed_sequences
from temper.synthetic import build_tokenizer, language_spec

VOCABULARY = 20


def network(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=24,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).double().eval()


def rows(seed: int, n: int = 4, width: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (n, width), generator=generator)
    lengths = torch.randint(4, width + 1, (n,), generator=generator)
    prompts = torch.randint(1, 3, (n,), generator=generator)
    at = torch.arange(width)
    attention = at < lengths[:, None]
    labels = torch.where(attention & (at >= prompts[:, None]), ids, -100)
    return {
        "input_ids": torch.where(attention, ids, 0),
        "attention_mask": attention.long(),
        "labels": labels,
        "ids": torch.arange(n),
    }


def plain_sums(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    sums = []
    for ids, attention, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(attention.sum())
        logps = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        sums.append(sum(logps[t - 1, labels[t]] for t in range(1, length) if labels[t] != -100))
    return sums


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sums_and_gradients_equal_a_loop_over_rows(fused: bool, seed: int):
    model = network()
    batch = rows(seed)
    found = score(model, batch, fused=fused)
    expected = torch.stack(plain_sums(model, batch))
    torch.testing.assert_close(found.sums, expected, rtol=1e-11, atol=1e-11)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad((found.sums * weights).sum(), list(model.parameters())),
        torch.autograd.grad((expected * weights).sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
    assert found.counts.tolist() == (batch["labels"][:, 1:] != -100).sum(1).tolist()


def test_pairs_go_through_as_one_batch_and_come_back_as_pairs():
    model = network()
    first = rows(0, width=7)
    second = rows(1, width=11)
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    paired = score(model, pair_rows(first, second), logits=True, hidden=True)
    assert calls == [(8, 11)]
    torch.testing.assert_close(
        paired.sums, torch.stack([score(model, first).sums, score(model, second).sums], dim=1)
    )
    assert paired.logits is not None and paired.logits.shape == (4, 2, 10, VOCABULARY)
    assert (
        paired.hidden is not None and [tuple(h.shape) for h in paired.hidden] == [(4, 2, 11, 8)] * 3
    )
    one = paired[:, 1]
    assert one.logits is not None and one.hidden is not None and one.attended is not None
    assert torch.equal(one.logps, paired.logps[:, 1]) and torch.equal(
        one.hidden[2], paired.hidden[2][:, 1]
    )
    assert torch.equal(
        one.attended, torch.nn.functional.pad(second["attention_mask"], (0, 0)).bool()
    )


@given(
    seed=st.integers(0, 50),
    extra=st.integers(1, 6),
    filler=st.integers(0, VOCABULARY - 1),
    fused=st.booleans(),
)
def test_padding_changes_nothing(seed: int, extra: int, filler: int, fused: bool):
    model = network()
    batch = rows(seed)
    pad = torch.nn.functional.pad
    wide = {
        "input_ids": pad(batch["input_ids"], (0, extra), value=filler),
        "attention_mask": pad(batch["attention_mask"], (0, extra)),
        "labels": pad(batch["labels"], (0, extra), value=-100),
    }
    torch.testing.assert_close(
        score(model, wide, fused=fused).sums,
        score(model, batch, fused=fused).sums,
        rtol=1e-11,
        atol=1e-11,
    )


def test_a_row_without_labels_counts_nothing_and_is_not_nan():
    batch = rows(0) | {"labels": torch.full((4, 9), -100)}
    for fused in (False, True):
        found = score(network(), batch, fused=fused)
        assert found.sums.tolist() == found.means.tolist() == [0.0] * 4
        assert int(nll(found).count) == 0


def test_hidden_states_equal_those_of_the_network():
    model = network()
    batch = rows(2)
    found = score(model, batch, hidden=True)
    own = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    ).hidden_states
    assert found.hidden is not None and all(
        torch.equal(a, b) for a, b in zip(found.hidden, own, strict=True)
    )
    fused = score(model, batch, hidden=True, fused=True)
    assert fused.hidden is not None
    torch.testing.assert_close(fused.hidden[-1], own[-1])


@pytest.mark.parametrize("lora", [None, LoRASpec(rank=2, alpha=4)])
def test_the_fused_loss_works_with_and_without_an_adapter(lora: LoRASpec | None):
    tokenizer = build_tokenizer(language_spec("tiny"))
    spec = NetworkSpec(
        shape=ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=32), lora=lora
    )
    model = build_network(spec, tokenizer)
    torch.testing.assert_close(
        score(model, rows(0), fused=True).sums, score(model, rows(0)).sums, rtol=1e-5, atol=1e-5
    )


def test_an_output_layer_adapter_learns_without_all_logits():
    tokenizer = build_tokenizer(language_spec("tiny"))
    shape = ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=32)
    model = build_network(
        NetworkSpec(shape=shape, lora=LoRASpec(rank=2, targets=["lm_head", "q_proj"])), tokenizer
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every, some = (
        torch.autograd.grad(score(model, rows(0), logits=full).sums.sum(), list(trained.values()))
        for full in (True, False)
    )
    for name, left, right in zip(trained, every, some, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
        assert left.any() or "lora_A" in name  # B starts at 0, so A has no gradient yet
    assert any("lm_head" in name for name in trained)


def test_the_fused_loss_is_refused_for_modified_logits():
    with pytest.raises(TemperError, match="fused_loss=true: this loss needs the logits"):
        score(network(), rows(0), logits=True, fused=True)
    for family, found in (("gemma2", "caps, scales or masks"), ("cohere", "caps, scales or masks")):
        (config,) = (make() for name, make in CAUSAL_LMS.items() if family in name)
        changed = AutoModelForCausalLM.from_config(config)
        for _ in range(2):  # tried once, refused every time
            with pytest.raises(TemperError, match=f"fused_loss=true: .* {found} its logits"):
                score(changed, rows(0), fused=True)
    spec = NetworkSpec(
        shape=ShapeSpec(hidden_size=16, n_layers=1, n_heads=2, intermediate_size=32),
        lora=LoRASpec(rank=2, targets=["lm_head"]),
    )
    with pytest.raises(TemperError, match="not a plain Linear"):
        output_layer(build_network(spec, build_tokenizer(language_spec("tiny"))))


FAMILIES = {
    "llama": lambda: LlamaConfig(**TINY, intermediate_size=16, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3
    ),
    "gemma3, sliding windows": lambda: Gemma3TextConfig(
        **TINY, intermediate_size=16, num_key_value_heads=1, head_dim=4, sliding_window=3
    ),
    "qwen2": lambda: Qwen2Config(**TINY, intermediate_size=16, num_key_value_heads=1),
}
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}


CAUSAL_LMS = FAMILIES | {
    "gemma2, capped logits": lambda: Gemma2Config(
        **TINY,
        intermediate_size=16,
        num_key_value_heads=1,
        head_dim=4,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=5.0,
    ),
    "cohere, scaled logits": lambda: CohereConfig(
        **TINY, intermediate_size=16, num_key_value_heads=1, logit_scale=0.3
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        state_size=4,
        initializer_range=0.5,
    ),
}


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_logits_are_computed_only_where_they_predict_a_label(family: str, pairs: bool):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CAUSAL_LMS[family]()).double().eval()
    batch = pair_rows(rows(1), rows(2, width=7)) if pairs else rows(1)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _head, _inputs, out: seen.append(out.shape[:-1].numel())
    )
    gradients = []
    for logits in (True, False):
        found = score(model, batch, logits=logits)
        weights = torch.linspace(-1, 1, found.sums.numel(), dtype=torch.float64).view_as(found.sums)
        gradients.append(
            [
                found.logps,
                *torch.autograd.grad((found.sums * weights).sum(), list(model.parameters())),
            ]
        )
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert seen == [batch["labels"].numel(), int((batch["labels"][..., 1:] != -100).sum())]
    assert not model.get_output_embeddings()._forward_pre_hooks, "the hook is removed"


def packed(batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("temper.data.packing.WORTH_IT", 100)
    return batch | {LENGTHS: batch["attention_mask"].sum(-1).numpy()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_score_as_padded_ones(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](), attn_implementation=attention
    ).eval()
    batch = rows(1, n=7)
    inputs = packed(batch, monkeypatch)
    shapes: list[torch.Size] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _m, words: shapes.append(words[0].shape)
    )
    plain = score(model, batch, logits=True, hidden=True)
    tight = score(model, inputs, logits=True, hidden=True)
    assert shapes[1].numel() < shapes[0].numel()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(tight.logps, plain.logps)
    assert (
        torch.equal(tight.mask, plain.mask)
        and tight.logits is not None
        and plain.logits is not None
    )
    close(tight.logits[plain.mask], plain.logits[plain.mask])
    present = batch["attention_mask"].bool()
    for left, right in zip(tight.hidden or (), plain.hidden or (), strict=True):
        close(left[present], right[present])
    assert isolates_packed_sequences(model)


def test_packed_pairs_and_fused_loss_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch):
    batch = pair_rows(rows(1), rows(2, width=7))
    gradients = []
    for inputs, fused in (
        (batch, False),
        (packed(batch, monkeypatch), False),
        (packed(batch, monkeypatch), True),
    ):
        model = network()
        scores = score(model, inputs, fused=fused)
        (scores[:, 0].sums - 0.5 * scores[:, 1].means).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for left, right in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
