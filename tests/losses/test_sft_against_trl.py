"""The NLL of SFT against TRL's own code, on the same numbers."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from temper.losses import Scores, nll


@pytest.mark.slow  # importing TRL takes longer than all else here
@pytest.mark.parametrize("size", [None, 2])
def test_trls_sft_trainer_has_the_same_loss_and_gradient(size: int | None):
    """As one batch, and as micro-batches, for which TRL gets the number of tokens."""
    trl = pytest.importorskip("trl", minversion="1.16.0")
    generator = torch.Generator().manual_seed(3)
    leaf = (-3 * torch.rand(5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(5, 7, generator=generator) < 0.5
    same = lambda tensor: tensor  # noqa: E731
    trainer = SimpleNamespace(
        model=torch.nn.Identity(),
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=same),
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False, max_length=None),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def theirs(rows: slice) -> torch.Tensor:
        logps = leaf[rows] * mask[rows]
        labelled = mask[rows]

        def model(**_: Any) -> Any:
            return SimpleNamespace(
                log_probs=logps,
                label_mask=labelled,
                entropy=torch.zeros_like(logps),
                is_top1=labelled,
            )

        inputs = {"attention_mask": torch.ones(len(logps), 8), "labels": None}
        return trl.SFTTrainer.compute_loss(
            trainer, model, inputs, num_items_in_batch=None if size is None else mask.sum()
        )

    step = size or 5
    their_loss = torch.stack(
        [theirs(slice(start, start + step)) for start in range(0, 5, step)]
    ).sum()
    micro_batches = [
        nll(Scores(leaf[start : start + step], mask[start : start + step]))
        for start in range(0, 5, step)
    ]
    our_loss = (
        torch.stack([terms.total for terms in micro_batches]).sum()
        / torch.stack([terms.count for terms in micro_batches]).sum()
    )
    assert float(our_loss) == pytest.approx(float(their_loss), rel=1e-12)
    ours = torch.autograd.grad(our_loss, leaf, retain_graph=True)[0]
    trls = torch.autograd.grad(their_loss, leaf)[0]
    torch.testing.assert_close(ours, trls, rtol=1e-10, atol=1e-14)
