"""Steering while answers are generated, and at no other time."""

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from callbacks.safety_steering import SafetySteering
from datamodules import SyntheticAlignment
from lightning_modules import SFTModule
from temper.edit.steering import hidden_differences, steer, steering_vectors
from temper.errors import TemperError
from tests.objectives import make_data, make_module, same_bits, weights


class Answers(L.Callback):
    """Keeps what every validation batch answered, and the hooks in place meanwhile."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.n_hooks: list[int] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)
        self.n_hooks.append(n_hooks(pl_module.network))

    on_test_batch_end = on_validation_batch_end


def n_hooks(network: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 0} | settings
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def module(**settings: Any) -> Any:
    return make_module(SFTModule, **settings)


def plain_vectors(network: torch.nn.Module, pairs: Any, n_tokens: int) -> torch.Tensor:
    """Row by row, without padding, from the residual stream that transformers gives (the last one
    is before the final norm).
    """
    network = copy.deepcopy(network).eval()
    blocks = network.transformer.h
    seen = []
    for block in blocks:
        block.register_forward_hook(
            lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    rows = []
    for ids, mask in zip(pairs["input_ids"], pairs["attention_mask"], strict=True):
        sides = []
        for side in (0, 1):
            seen.clear()
            with torch.no_grad():
                network(input_ids=ids[side][mask[side].bool()][None])
            sides.append(torch.stack([h[0, -n_tokens:].mean(0) for h in seen]))
        rows.append((sides[0] - sides[1]).flatten())
    flat = torch.stack(rows)
    component = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors[:, -1]
    component = component * torch.sign(component @ flat.mean(0))
    return (component + flat.mean(0)).view(len(blocks), -1)


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_vectors_match_a_plain_computation_row_by_row(n_tokens):
    network = module().network
    pairs = _pairs()
    found = steering_vectors(hidden_differences(network, pairs, n_tokens))
    torch.testing.assert_close(found, plain_vectors(network, pairs, n_tokens), rtol=1e-7, atol=1e-9)
    assert network.training and n_hooks(network) == 0


def _pairs() -> Any:
    data = make_data()
    data.setup("validate")
    return {name: value[:12] for name, value in data.steering_pairs().items()}


def test_answers_are_those_of_a_network_steered_by_hand():
    plain = Answers()
    steered = Answers()
    by_hand = Answers()
    trainer(plain).validate(module(), make_data(), verbose=False)
    subject = module()
    trainer(SafetySteering(alpha=8.0), steered).validate(subject, make_data(), verbose=False)
    assert steered.n_hooks == [2] and n_hooks(subject.network) == 0

    other = module()
    data = make_data()
    data.setup("validate")
    vectors = plain_vectors(other.network, data.steering_pairs(), 4)
    for block, v in zip(other.network.transformer.h, vectors, strict=True):
        block.mlp.register_forward_hook(lambda _m, _i, out, v=v: steer(out, v, 8.0))
    trainer(by_hand).validate(other, make_data(), verbose=False)
    assert torch.equal(steered.outputs[0], by_hand.outputs[0])
    assert not torch.equal(steered.outputs[0], plain.outputs[0])


def test_alpha_zero_answers_the_same_and_hooks_nothing():
    plain = Answers()
    off = Answers()
    trainer(plain).validate(module(), make_data(), verbose=False)
    trainer(SafetySteering(alpha=0.0), off).validate(module(), make_data(), verbose=False)
    assert torch.equal(off.outputs[0], plain.outputs[0]) and off.n_hooks == [0]


def test_training_is_untouched_bit_for_bit():
    settings = {
        "max_steps": 3,
        "val_check_interval": 1,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
    }
    left = module()
    right = module()
    answers = Answers()
    trainer(**settings).fit(left, make_data())
    trainer(SafetySteering(alpha=5.0), answers, **settings).fit(right, make_data())
    assert len(answers.n_hooks) >= 2 and set(answers.n_hooks) == {2}
    assert same_bits(weights(left), weights(right))
    assert n_hooks(right.network) == 0


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_exception_leaves_no_hook(verb):
    class Broken(L.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the middle of it")

        on_test_batch_end = on_validation_batch_end

    subject = module()
    with pytest.raises(RuntimeError, match="in the middle"):
        getattr(trainer(SafetySteering(), Broken()), verb)(subject, make_data(), verbose=False)
    assert n_hooks(subject.network) == 0


def test_an_exception_while_computing_vectors_leaves_no_hook(monkeypatch):
    subject = module()
    monkeypatch.setattr(subject.network.transformer.h[1].mlp, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(SafetySteering()).validate(subject, make_data(), verbose=False)
    assert n_hooks(subject.network) == 0


def test_demonstrations_answer_and_refuse_the_same_prompts():
    data = make_data()
    pairs = _pairs()
    carried_out, refused = (
        [
            data.tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(
                pairs["input_ids"][:, s], pairs["attention_mask"][:, s], strict=True
            )
        ]
        for s in (0, 1)
    )
    assert all("<null>" in text for text in refused) and not any(
        "<null>" in text for text in carried_out
    )
    assert all(
        a.split("<null>")[0].strip()[:20] == b.split("<null>")[0].strip()[:20]
        for a, b in zip(carried_out, refused, strict=True)
    )


class WithoutPairs(SyntheticAlignment):
    steering_pairs = None


def test_bad_arguments_and_missing_demonstrations_are_refused():
    with pytest.raises(TemperError, match="SafetySteering.alpha=-1: "):
        SafetySteering(alpha=-1)
    with pytest.raises(TemperError, match="SafetySteering.n_tokens=0"):
        SafetySteering(n_tokens=0)
    sizes = {"n_alignment": 20, "n_harmful": 4, "batch_size": 4, "harmful_batch_size": 4}
    data = WithoutPairs(preset="tiny", n_eval=4, **sizes)
    with pytest.raises(TemperError, match=r"data=WithoutPairs .*steering_pairs\(\)"):
        trainer(SafetySteering()).validate(module(), data, verbose=False)
