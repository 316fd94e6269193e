"""Small models and data for preference objectives, and plain log-probabilities of answers."""

from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from peft import LoraConfig, get_peft_model

from datamodules.synthetic_kto import SyntheticKTO
from datamodules.synthetic_preference import SyntheticPreference
from lightning_modules import ObjectiveModule
from temper.data import Batch
from temper.models import LoRASpec, NetworkSpec
from tests.objectives import SHAPE, exact_network, make_module

SMALL = {"preset": "tiny", "batch_size": 6, "n_eval": 4, "seed": 1}


def make_pairs(**changes: Any) -> SyntheticPreference:
    """Twelve pairs of unequal length in batches of six."""
    return SyntheticPreference(**SMALL | {"n_pairs": 12} | changes)


def make_kto(**changes: Any) -> SyntheticKTO:
    """Twelve rows in batches of six."""
    return SyntheticKTO(**SMALL | {"n_rows": 12} | changes)


def exact_lora(kind: type[ObjectiveModule], **settings: Any) -> ObjectiveModule:
    """A module on a float64 GPT-2 with a new adapter."""
    module = kind(
        NetworkSpec(shape=SHAPE, lora=LoRASpec(rank=2, alpha=4)),
        **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings,
    )
    torch.manual_seed(5)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    module.network = get_peft_model(exact_network(len(make_pairs().tokenizer)), config).double()
    return module


def exact(kind: type[ObjectiveModule], **settings: Any) -> ObjectiveModule:
    """A module on a float64 GPT-2."""
    return make_module(kind, data=make_pairs(), **settings)


def plain_logps(
    network: torch.nn.Module, rows: Batch, which: int
) -> tuple[list[torch.Tensor], list[int]]:
    """Sum over labelled tokens and their number, for one sequence of every row on its own: no
    padding, no batch.
    """
    sums = []
    counts = []
    for ids, mask, labels in zip(
        *(rows[name][:, which] for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = int(mask.sum())
        logps = torch.log_softmax(network(input_ids=ids[None, :length]).logits[0], dim=-1)
        picked = [logps[t - 1, labels[t]] for t in range(1, length) if labels[t] != -100]
        sums.append(sum(picked))
        counts.append(len(picked))
    return sums, counts


def run(
    module: ObjectiveModule, data: Any, steps: int, path: Any = None, **settings: Any
) -> L.Trainer:
    """Train without any side effect, from a checkpoint if one is given."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(**quiet | settings)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return trainer


def batches(data: Any, steps: int) -> list[Batch]:
    """The first global batches."""
    data.setup("fit")
    (source,) = data.sources.values()
    return [source.batch(number) for number in range(steps)]
