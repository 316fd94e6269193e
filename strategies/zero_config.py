"""DeepSpeed's settings and precision under Temper, and the versions of it that will do."""

from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision

from temper.errors import TemperError

# Weight spaces read and write attributes of DeepSpeed's optimizers that are not public (zero_spaces.py and zero12.py list them).
WRITTEN_FOR = "0.19."


class ZeROPrecision(DeepSpeedPrecision):
    """Precision as under the other strategies: autocast for ``bf16-mixed``, nothing is converted behind the user's back.

    DeepSpeed's own bf16 mode would turn float32 adapters into bfloat16 ones, which a displacement of weights cannot move.
    """

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for ``bf16-mixed``."""
        if self.precision != "bf16-mixed":
            return self.tensor_init_context()
        # No cache: it would hand the weights of the first pass to a pass at displaced ones.
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16, cache_enabled=False)


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


def check_deepspeed() -> None:
    """Refuse to go on without the DeepSpeed that the weight spaces were written for.

    Raises:
        TemperError: with the command that installs it.
    """
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise TemperError(
            "trainer.strategy: DeepSpeed is not installed: pip install -e '.[deepspeed]' -c constraints.txt, or use fsdp2"
        ) from None
    if not found.startswith(WRITTEN_FOR):
        raise TemperError(
            f"trainer.strategy: DeepSpeed {found} is installed, and ZeRO's weight spaces are written for {WRITTEN_FOR}*, whose inner parts "
            "they use; pip install -e '.[deepspeed]' -c constraints.txt, or use fsdp2"
        )
