"""Small models and data for unlearning, and its losses re-computed in float64 by plain loops."""

import copy
import functools
from typing import Any

import pytest
import torch

from datamodules.synthetic_unlearning import SyntheticUnlearning
from lightning_modules.unlearning import UnlearningModule
from strategies import WeightSpace
from temper.models import FrozenCopy
from tests.objectives import make_module, relative_error, trainable

GAMMA = 0.7
ALPHA = 1.3


def unlearning_data(**changes: Any) -> SyntheticUnlearning:
    """Eight rows to forget and eight to retain, in batches of eight; all with a refusal."""
    sizes = {
        "preset": "tiny",
        "n_forget": 8,
        "n_retain": 8,
        "batch_size": 8,
        "retain_batch_size": 8,
        "retain_substitutes": True,
        "n_eval": 4,
        "seed": 1,
    }
    return SyntheticUnlearning(**(sizes | changes))


@functools.cache
def batches() -> dict[str, Any]:
    """The first batch of every stream."""
    data = unlearning_data()
    data.setup("fit")
    return {name: source.batch(0) for name, source in data.sources.items()}


@functools.cache
def vocabulary() -> SyntheticUnlearning:
    """Data of which only the tokenizer is read; made once."""
    return unlearning_data()


def module_of(forget: str, retain: str, **settings: Any) -> UnlearningModule:
    """A module with these losses and a small float64 network."""
    return make_module(UnlearningModule, vocabulary(), forget=forget, retain=retain, **settings)


def other_network(network: torch.nn.Module) -> torch.nn.Module:
    """A copy with other weights: a reference that is not the policy."""
    moved = copy.deepcopy(network)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
    return moved


def one_step(
    module: Any, batch: Any, reference: Any = None
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradient of a training step that ends before the optimizer's."""
    seen: dict[str, Any] = {}
    module._weights = WeightSpace(
        {name: p for name, p in module.named_parameters() if p.requires_grad}
    )
    if module.reference_needs != "nothing":
        module._reference = FrozenCopy(reference or module.network)
    weighted = module.weighted_gradient

    def spy(*parts: Any) -> Any:
        seen["losses"], seen["gradient"] = weighted(*parts)
        return seen["losses"], seen["gradient"]

    module.weighted_gradient = spy
    module.apply_gradient = lambda *_: True
    module.log = module.log_dict = lambda *_, **__: None
    module.training_step(batch, 0)
    module.weighted_gradient = weighted
    return [float(loss) for loss in seen["losses"]], [g.clone() for g in seen["gradient"]]


# -- the equations in plain torch


def outputs(
    network: Any, rows: Any, *place: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Of one sequence: log-probabilities over the vocabulary before every answer token, those
    tokens, hidden states.
    """
    size = int(rows["attention_mask"][place].sum())
    out = network(input_ids=rows["input_ids"][place][None, :size], output_hidden_states=True)
    where = [t for t in range(1, size) if rows["labels"][place][t] != -100]
    return (
        torch.stack([out.logits[0, t - 1] for t in where]),
        rows["labels"][place][where],
        [h[0] for h in out.hidden_states],
    )


def logps(network: Any, rows: Any, *place: int) -> torch.Tensor:
    """Log-probability of every answer token of one sequence."""
    logits, labels, _ = outputs(network, rows, *place)
    return torch.stack([torch.log_softmax(z, -1)[y] for z, y in zip(logits, labels, strict=True)])


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    """Mean of scalars."""
    return sum(values) / len(values)


def plain_forget(name: str, policy: Any, reference: Any, rows: Any) -> torch.Tensor:
    """The forget loss, row by row and token by token."""
    n = len(rows["ids"])
    b = 0.1
    answer = [logps(policy, rows, i, 0) for i in range(n)]
    substitute = [logps(policy, rows, i, 1) for i in range(n)]

    def log_ratio(k: int) -> list[torch.Tensor]:
        own = (answer, substitute)[k]
        return [own[i].sum() - logps(reference, rows, i, k).detach().sum() for i in range(n)]

    if name == "bounded":
        return mean([-s.mean() + 0.1 * a.mean() for a, s in zip(answer, substitute, strict=True)])
    if name == "npo":
        return mean([-2 / b * torch.log(1 / (1 + torch.exp(b * x))) for x in log_ratio(0)])
    if name == "simnpo":
        return mean([-2 / 4.5 * torch.log(1 / (1 + torch.exp(4.5 * a.mean()))) for a in answer])
    if name == "idk_dpo":
        return mean(
            [
                -2 / b * torch.log(1 / (1 + torch.exp(b * (x - y))))
                for x, y in zip(log_ratio(0), log_ratio(1), strict=True)
            ]
        )
    if name == "undial":
        values = []
        for i in range(n):
            z, labels, _ = outputs(policy, rows, i, 0)
            z_ref, _, _ = outputs(reference, rows, i, 0)
            for t, y in enumerate(labels):
                lowered = z_ref[t].detach().clone()
                lowered[y] -= 10
                values.append(-(torch.softmax(lowered, -1) * torch.log_softmax(z[t], -1)).sum())
        return mean(values)
    every = torch.cat(substitute if name == "idk_nll" else answer)
    p = every.detach().exp()
    return {"ga": every, "idk_nll": -every, "wga": p * every, "satimp": p**5 * (1 - p) * every}[
        name
    ].mean()


def plain_retain(name: str, policy: Any, reference: Any, rows: Any) -> torch.Tensor:
    """The retain loss, row by row and token by token."""
    n = len(rows["ids"])
    if name == "none":
        return torch.zeros((), dtype=torch.float64)
    if name == "nll":
        return -torch.cat([logps(policy, rows, i, 0) for i in range(n)]).mean()
    if name == "bounded":
        pairs = [[logps(policy, rows, i, k) for k in (0, 1)] for i in range(n)]
        return mean([-answer.mean() + 0.1 * refusal.mean() for answer, refusal in pairs])
    if name == "kl_all":  # every token but the first is predicted
        rows = rows | {"labels": rows["input_ids"].where(rows["attention_mask"] == 1, -100)}
    values = []
    for i in range(n):
        z, _, h = outputs(policy, rows, i, 0)
        z_ref, _, h_ref = outputs(reference, rows, i, 0)
        if name in ("kl", "kl_all"):
            for t in range(len(z)):
                ref = torch.log_softmax(z_ref[t].detach(), -1)
                values.append((ref.exp() * (ref - torch.log_softmax(z[t], -1))).sum())
        else:
            for t in range(len(h[0])):
                values.append(
                    sum(
                        ((a[t] - b[t].detach()) ** 2).sum()
                        for a, b in zip(h[1:], h_ref[1:], strict=True)
                    )
                    / (len(h) - 1)
                )
    return sum(values) / len(values)


@functools.cache
def plain_part(kind: str, name: str) -> tuple[float, list[torch.Tensor]]:
    """A forget or retain loss on `batches`, and its gradient."""
    network = module_of("ga", "none").network
    loss = {"forget": plain_forget, "retain": plain_retain}[kind](
        name, network, other_network(network), batches()[kind]
    )
    if not loss.requires_grad:
        return 0.0, [torch.zeros_like(p) for p in trainable(network)]
    return float(loss.detach()), list(
        torch.autograd.grad(loss, trainable(network), materialize_grads=True)
    )


def check_step(forget: str, retain: str, sizes: tuple[int | None, ...]) -> None:
    """Compare losses and gradient of a step with the equations, for every micro-batch size."""
    f, f_grad = plain_part("forget", forget)
    r, r_grad = plain_part("retain", retain)
    plain = [GAMMA * a + ALPHA * b for a, b in zip(f_grad, r_grad, strict=True)]
    module = module_of(forget, retain, gamma=GAMMA, alpha=ALPHA)
    reference = other_network(module.network)
    for module.micro_batch_size in sizes:
        losses, gradient = one_step(module, batches(), reference)
        assert losses == pytest.approx([f, r], rel=1e-10, abs=1e-14)
        assert relative_error(gradient, plain) < 1e-10
