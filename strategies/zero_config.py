"""DeepSpeed's settings and precision under Temper."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision
from torch import nn


class ZeROPrecision(DeepSpeedPrecision):
    """Precision as under the other strategies: autocast for ``bf16-mixed``, nothing is converted behind the user's back.

    DeepSpeed's own bf16 mode would turn float32 adapters into bfloat16 ones, which a displacement of weights cannot move.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast for ``bf16-true`` alone: DeepSpeed's ``32-true`` would make a bfloat16 base twice its size."""
        return module.to(torch.bfloat16) if self.precision == "bf16-true" else module

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New weights in bfloat16 for ``bf16-true``; else networks say what they are."""
        return super().tensor_init_context() if self.precision == "bf16-true" else nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for ``bf16-mixed``."""
        if self.precision != "bf16-mixed":
            return self.tensor_init_context()
        # Lightning's own, which keeps no cache: that would hand the weights of the first pass to a pass at displaced ones.
        return MixedPrecision("bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu").forward_context()


def settings(stage: int, offload_optimizer: bool, offload_parameters: bool, bucket_size: int) -> dict[str, Any]:
    """DeepSpeed's config: clipping, precision, accumulation and schedules are Temper's own."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,  # gradients are read right after each backward pass
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size,
    }
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket_size, "stage3_param_persistence_threshold": 0}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # for its log lines alone
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }
