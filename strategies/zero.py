"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) are cut into one part per rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from strategies.parts import PartsCheckpoints
from strategies.zero_config import ZeROPrecision, settings
from temper.deepspeed_version import check_deepspeed
from temper.errors import TemperError


class ZeROStrategy(PartsCheckpoints, DeepSpeedStrategy):
    """DeepSpeed ZeRO for objectives of several passes, on GPUs and (slowly, for tests) on CPUs.

    Args:
        stage: 1 cuts the optimizer's state, 2 its gradients too, 3 the weights too.
        offload_optimizer: Keep the optimizer's state, and take its steps, in the host's memory.
        offload_parameters: Keep the weights in the host's memory between uses; stage 3 alone.
        bucket_size: Elements that are sent together.
        timeout_minutes: How long a rank waits for another one before the job fails.

    Raises:
        TemperError: DeepSpeed is missing, or of a version that this was not written for; options that contradict each other.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        bucket_size: int = 50_000_000,
        timeout_minutes: float = 30,
    ) -> None:
        check_deepspeed()
        if stage not in (1, 2, 3):
            raise TemperError(f"trainer.strategy.init_args.stage={stage}: give 1, 2 or 3")
        if offload_parameters and stage != 3:
            raise TemperError(
                f"trainer.strategy.init_args.offload_parameters=true: stage {stage} keeps all weights on every device; set "
                "stage=3, or drop it"
            )
        config = settings(stage, offload_optimizer, offload_parameters, bucket_size)
        super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes))
        self.stage, self.shards_weights = stage, stage == 3

    # -- start-up

    def setup_environment(self) -> None:
        """As DeepSpeedStrategy, also without a GPU."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed asks the machine, not the Trainer
        import deepspeed

        # Its shared-memory kernels are compiled on first use: a minute, and a lock that stays if that is interrupted.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DDPStrategy, self).setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """As DeepSpeedStrategy, whose check of device indices knows GPUs only."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        from lightning.fabric.utilities.seed import reset_seed

        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def precision_plugin(self) -> Precision:
        """The Trainer's, which is made into `ZeROPrecision`."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        is_deepspeeds = isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, ZeROPrecision)
        self._precision_plugin = ZeROPrecision(plugin.precision) if is_deepspeeds else plugin  # type: ignore[union-attr]

    def _init_config_if_needed(self) -> None:
        """Nothing: the config is complete. Lightning would switch DeepSpeed's own precision on."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Networks are built whole and cut afterwards: built under ``zero.Init``, random weights are others."""
        yield

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Evaluation alone: without an optimizer there is something to cut in stage 3 only."""
        if self.stage != 3:
            self.model = model.to(self.root_device)
            return
        import deepspeed

        self.model, *_ = deepspeed.initialize(config=self.config, model=model, model_parameters=[], dist_init_required=False)

    # -- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own: it calls the engine once for every pass (`ZeROWeightSpace`)."""
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)  # type: ignore[union-attr]

    def gather(self, parameter: Tensor) -> Tensor:
        """A whole weight, on every rank."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole weight; outside training, where there is no exact copy of it."""
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(whole)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.is_global_zero:
                parameter.copy_(whole)

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state: DeepSpeed's wraps it."""
        return self.model.optimizer.optimizer  # type: ignore[union-attr,return-value]
