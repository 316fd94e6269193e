"""RepNoise against a separate float64 computation, and its laws."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from datamodules import SyntheticAlignment
from lightning_modules import SFTModule
from lightning_modules.repnoise import RepNoiseModule, check_pairs, harmful_rows
from temper.errors import TemperError
from temper.models.lens import final_norm_and_head
from tests.losses.test_mmd import plain_mmd
from tests.objectives import (
    fit,
    global_batches,
    make_data,
    make_module,
    plain_mean_nll,
    relative_error,
    same_bits,
    trainable,
    weights,
)

SGD = partial(torch.optim.SGD, lr=1.0)


def plain_differs(pairs: dict[str, torch.Tensor]) -> list[list[bool]]:
    """Positions of the harmful answer whose token the refusal does not have in the same place, by
    loops.
    """
    flags = []
    for (harmful, refusal), (present, other) in zip(
        pairs["input_ids"].tolist(), pairs["attention_mask"].tolist(), strict=True
    ):
        flags.append(
            [
                bool(present[t]) and not (other[t] and harmful[t] == refusal[t])
                for t in range(len(harmful))
            ]
        )
    return flags


def plain_loss(
    network: Any,
    batch: dict[str, Any],
    alpha: float,
    beta: float,
    ascent: str,
    noise_at: str,
    noise_seed: int,
) -> torch.Tensor:
    """The whole objective on GPT-2, written out."""
    pairs = batch["harmful_pairs"]
    blocks = network.transformer.h
    differs = torch.tensor(plain_differs(pairs))
    outputs: list[torch.Tensor] = []
    hooks = [
        block.mlp.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in blocks
    ]
    hidden = network(
        input_ids=pairs["input_ids"][:, 0],
        attention_mask=pairs["attention_mask"][:, 0],
        output_hidden_states=True,
    ).hidden_states
    for hook in hooks:
        hook.remove()
    activations = outputs if noise_at == "mlp" else hidden[1:]
    generator = torch.Generator().manual_seed(noise_seed)
    mmds = []
    for h in activations:
        noise = torch.randn(h.shape, generator=generator, dtype=h.dtype)
        rows = [
            torch.stack([(part[b] * differs[b][:, None]).reshape(-1) for b in range(len(h))])
            for part in (h, noise)
        ]
        mmds.append(plain_mmd(*rows))
    nlls = []
    for number, h in enumerate(hidden):
        state = h if number == len(hidden) - 1 else network.transformer.ln_f(h)
        logps = torch.log_softmax(network.lm_head(state), -1)
        terms = []
        for b in range(len(h)):
            for t in range(1, h.shape[1]):
                if differs[b, t] and pairs["labels"][b, 0, t] != -100:
                    terms.append(-logps[b, t - 1, pairs["labels"][b, 0, t]])
        nlls.append(sum(terms) / len(terms))
    mean = sum(nlls) / len(nlls)
    climbed = torch.log(mean) if ascent == "log" else torch.log(1 + mean)
    return (
        plain_mean_nll(network, batch["alignment"]) + beta * sum(mmds) / len(mmds) - alpha * climbed
    )


@pytest.mark.parametrize(
    "settings", [{}, {"ascent": "log1p", "noise_at": "mlp"}], ids=["paper", "released"]
)
def test_one_step_has_the_loss_and_gradient_of_the_equation(settings: dict[str, str]):
    module = make_module(
        RepNoiseModule, alpha=0.7, beta=0.3, seed=2, max_grad_norm=None, optimizer=SGD, **settings
    )
    network = copy.deepcopy(module.network)
    start = weights(module)
    noted = {}
    module.log = lambda name, value, **_: noted.update({name: value})
    module.log_dict = noted.update
    fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    form = {"ascent": "log", "noise_at": "layers"} | settings
    loss = plain_loss(network, batch, 0.7, 0.3, form["ascent"], form["noise_at"], 2 * 1_000_003)
    gradient = torch.autograd.grad(loss, trainable(network))
    step = [a - b for a, b in zip(start, weights(module), strict=True)]
    assert relative_error(step, list(gradient)) < 1e-10
    climb = torch.log if form["ascent"] == "log" else torch.log1p
    found = (
        noted["loss/alignment"]
        + 0.3 * noted["repnoise/mmd"]
        - 0.7 * climb(noted["repnoise/harmful_nll"])
    )
    assert float(found) == pytest.approx(float(loss), rel=1e-6)  # notes are float32


@pytest.mark.parametrize("part", [{"alpha": 0.0}, {"beta": 0.0}])
def test_every_part_can_be_switched_off_alone(part: dict[str, float]):
    settings = {"alpha": 0.7, "beta": 0.3} | part
    module = make_module(RepNoiseModule, max_grad_norm=None, optimizer=SGD, **settings)
    network = copy.deepcopy(module.network)
    start = weights(module)
    fit(module, make_data(), 1)
    (batch,) = global_batches(make_data(), 1)
    gradient = torch.autograd.grad(
        plain_loss(network, batch, settings["alpha"], settings["beta"], "log", "layers", 0),
        trainable(network),
    )
    assert (
        relative_error([a - b for a, b in zip(start, weights(module), strict=True)], list(gradient))
        < 1e-10
    )


def test_without_alpha_and_beta_it_is_sft_bit_for_bit():
    both = make_module(RepNoiseModule, alpha=0.0, beta=0.0), make_module(SFTModule)
    for module in both:
        fit(module, make_data(), 3)
    assert same_bits(weights(both[0]), weights(both[1]))


def test_the_fused_loss_gives_the_same_step():
    plain, fused = (
        make_module(RepNoiseModule, alpha=0.7, beta=0.3, fused_loss=flag) for flag in (False, True)
    )
    for module in (plain, fused):
        fit(module, make_data(), 2)
    assert relative_error(weights(fused), weights(plain)) < 1e-9


def test_only_tokens_that_differ_from_the_refusal_are_masked_in():
    # a prompt of 2; the second response token is the same; the refusal is shorter, and padded with
    # the id 9
    pairs = {
        "input_ids": torch.tensor([[[5, 6, 1, 2, 9, 3], [5, 6, 4, 2, 9, 9]]]),
        "attention_mask": torch.tensor([[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]]),
        "labels": torch.tensor([[[-100, -100, 1, 2, 9, -100], [-100, -100, 4, 2, -100, -100]]]),
    }
    rows = harmful_rows(pairs)
    assert rows["differs"].tolist() == [[False, False, True, False, True, False]]
    assert rows["labels"].tolist() == [[-100, -100, 1, -100, 9, -100]]
    (batch,) = global_batches(make_data(), 1)
    assert harmful_rows(batch["harmful_pairs"])["differs"].tolist() == plain_differs(
        batch["harmful_pairs"]
    )


def test_masked_out_positions_do_not_reach_the_mmd():
    hidden = torch.randn(3, 5, 4)
    differs = torch.tensor([[False, True, True, False, False]] * 3)
    other = torch.where(differs[..., None], hidden, torch.randn(3, 5, 4) * 100)
    mmd = [
        RepNoiseModule._mmd(SimpleNamespace(seed=0, global_step=0), [h], differs)
        for h in (hidden, other)
    ]
    assert torch.equal(*mmd)


def test_the_noise_depends_on_seed_and_step_alone():
    differs = torch.ones(3, 5, dtype=torch.bool)
    hidden = [torch.ones(3, 5, 4), torch.ones(3, 5, 4)]

    def mmd(seed: int, step: int) -> torch.Tensor:
        torch.randn(7)  # the global stream moves on, and plays no part
        return RepNoiseModule._mmd(SimpleNamespace(seed=seed, global_step=step), hidden, differs)

    assert torch.equal(mmd(1, 3), mmd(1, 3))
    assert len({float(mmd(seed, step)) for seed, step in ((1, 3), (1, 4), (2, 3))}) == 3


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Any):
    settings = {"beta": 0.5, "double": False, "optimizer": partial(torch.optim.AdamW, lr=0.01)}
    whole, first, second = (make_module(RepNoiseModule, **settings) for _ in range(3))
    fit(whole, make_data(), 5)
    fit(first, make_data(), 2).save_checkpoint(tmp_path / "run.ckpt")
    import lightning.pytorch as L

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=5,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(second, datamodule=make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert same_bits(weights(second), weights(whole))
    assert not same_bits(weights(first), weights(whole))


@pytest.mark.parametrize("noise_at", ["layers", "mlp"])
def test_lora_trains_adapters_alone(noise_at: str):
    module = make_module(
        RepNoiseModule,
        lora=True,
        double=False,
        noise_at=noise_at,
        optimizer=partial(torch.optim.AdamW, lr=0.05),
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, make_data(), 3)
    assert {name for name, p in module.named_parameters() if not torch.equal(p, before[name])} == {
        name for name in before if "lora_" in name
    }


TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NETWORKS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, intermediate_size=32)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**TINY, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_lens_is_the_networks_own_output(name: str):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for parameter in (
        network.parameters()
    ):  # norms start at 1 and 0, where reading twice looks like reading once
        torch.nn.init.normal_(parameter, std=0.5)
    norm, head = final_norm_and_head(network)
    out = network(input_ids=torch.arange(6)[None], output_hidden_states=True)
    assert torch.equal(head(out.hidden_states[-1]), out.logits)
    last: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _m, _i, output: last.append(output))
    network(input_ids=torch.arange(6)[None])
    hook.remove()
    assert len(last) == 1 and torch.equal(last[0], out.hidden_states[-1])


def test_networks_without_a_known_lens_are_refused():
    capped = NETWORKS["llama"]()
    capped.lm_head.register_forward_hook(lambda _head, _inputs, out: 30 * (out / 30).tanh())
    with pytest.raises(
        TemperError, match="the logit lens reads hidden states through the output layer.*alpha=0"
    ):
        final_norm_and_head(capped)
    odd = NETWORKS["llama"]()
    odd.model.closing = odd.model.norm
    del odd.model.norm
    object.__setattr__(odd.model, "norm", lambda hidden: odd.model.closing(hidden))
    with pytest.raises(TemperError, match="no final norm under a known name.*alpha=0"):
        final_norm_and_head(odd)


def test_rows_that_are_no_pairs_are_refused():
    (batch,) = global_batches(make_data(), 1)
    check_pairs(batch["harmful_pairs"], "harmful_pairs")
    with pytest.raises(
        TemperError, match="stream 'harmful_pairs': its rows are shaped .* not B x 2 x T"
    ):
        check_pairs(batch["harmful"], "harmful_pairs")
    mixed = {name: value.clone() for name, value in batch["harmful_pairs"].items()}
    mixed["input_ids"][0, 1, 1] += 1
    with pytest.raises(TemperError, match="do not begin with the same prompt"):
        check_pairs(mixed, "harmful_pairs")


class Unpaired(SyntheticAlignment):
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.sources["harmful_pairs"] = self.sources["harmful"]


def test_unpaired_data_and_several_ranks_are_refused():
    module = make_module(RepNoiseModule)
    data = Unpaired(
        preset="tiny", n_alignment=12, n_harmful=6, batch_size=6, harmful_batch_size=4, n_eval=4
    )
    with pytest.raises(TemperError, match="not B x 2 x T"):
        fit(module, data, 1)
    assert module.work.passes == 0
    module._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    with pytest.raises(TemperError, match=r"2 ranks, and RepNoise.*trainer\.devices=1"):
        module.setup("fit")
    module.setup("validate")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("alpha", -1.0),
        ("beta", -0.1),
        ("seed", -1),
        ("ascent", "exp"),
        ("noise_at", "attn"),
        ("micro_batch_size", 2),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(flag: str, value: Any):
    with pytest.raises(TemperError, match=f"model.init_args.{flag}={value}"):
        make_module(RepNoiseModule, **{flag: value})
