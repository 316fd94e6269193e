"""DeepSpeed ZeRO: stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights too.

In this file: the precision plugin and DeepSpeed's settings under Temper, the weight spaces of
stages 1 and 2 and of stage 3, and the Lightning strategy.

The weight spaces use attributes of DeepSpeed's optimizers that are not public (0.19):

* stages 1 and 2, `DeepSpeedZeroOptimizer`: ``averaged_gradients``, ``bit16_groups_flat``,
  ``cpu_offload``, ``micro_step_id``, ``parallel_partitioned_bit16_groups``,
  ``real_dp_process_group``, ``round_robin_bit16_groups`` and ``_offsets``,
  ``single_partition_of_fp32_groups``, and the arguments of ``all_gather_dp_groups``;
* stage 3, `DeepSpeedZeroOptimizer_Stage3`: ``empty_partition_cache``,
  ``fp32_partitioned_groups_flat``, ``get_param_id``, ``grad_position``; of a parameter
  ``ds_numel``, ``ds_process_group``, ``ds_tensor``; the local getters and setters of
  ``deepspeed.utils``.

`temper.packages.check_deepspeed` refuses other versions, and two-process tests compare
every stage with one process.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from strategies.sharded import ShardedWeightSpace
from strategies.weight_space import Loss, Vector, accumulate
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms
from temper.packages import check_deepspeed
from temper.sharded_checkpoint import ShardedCheckpointMixin

# -- precision and settings


class ZeROPrecision(DeepSpeedPrecision):
    """Precision as under the other strategies: autocast for ``bf16-mixed``, and no weights are
    converted.

    DeepSpeed's own bf16 mode would turn float32 adapters into bfloat16 ones, which are too coarse
    for a displacement.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast for ``bf16-true`` only: DeepSpeed's ``32-true`` would double the size of a bfloat16
        base model.
        """
        return module.to(torch.bfloat16) if self.precision == "bf16-true" else module

    def convert_input(self, data: Any) -> Any:
        """The data, unchanged."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New weights in bfloat16 for ``bf16-true``; otherwise in the network's own dtype."""
        return super().tensor_init_context() if self.precision == "bf16-true" else nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for ``bf16-mixed``."""
        if self.precision != "bf16-mixed":
            return self.tensor_init_context()
        # Lightning's autocast, which keeps no cache: a cache would return the weights of the first
        # pass to a pass at displaced ones.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return MixedPrecision("bf16-mixed", device).forward_context()


def deepspeed_config(
    stage: int, offload_optimizer: bool, offload_parameters: bool, bucket_size: int
) -> dict[str, Any]:
    """DeepSpeed's config: clipping, precision, accumulation and schedules are Temper's own."""
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,  # gradients are read right after each backward pass
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size,
    }
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket_size
        zero["stage3_param_persistence_threshold"] = 0
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # only for its log lines
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


# -- weight spaces


@dataclass(frozen=True)
class ShardLocation:
    """Location of a rank's shard of a parameter in its flat partitions, one per parameter group.

    Attributes:
        group: Index of the partition.
        first: First element in the partition.
        last: Last element in the partition, exclusive.
        start: First element in the flattened parameter.
    """

    group: int
    first: int
    last: int
    start: int


class ZeROWeightSpace(ShardedWeightSpace):
    """Weight space of all stages: each pass goes through the engine, once forward and once
    backward, and its gradients are taken from DeepSpeed's buffers before the next pass.
    """

    locations: list[ShardLocation]

    @property
    def engine(self) -> Any:
        """DeepSpeed's wrapper around the module."""
        return self._zero_strategy.model

    @property
    def _zero_strategy(self) -> "ZeROStrategy":
        assert isinstance(self.strategy, ZeROStrategy)
        return self.strategy

    def _pass(self, loss: Loss, rows: Batch) -> MeanTerms:
        terms: list[MeanTerms] = []

        def forward(micro_batch: Batch) -> Tensor:
            # Again: the engine switches off an autocast that its config does not name.
            with self._zero_strategy.precision_plugin.forward_context():
                terms.append(loss(micro_batch))
            return terms[-1].total

        self.engine.optimizer.zero_grad()
        self._zero_gradient_buffers()
        self.engine.backward(self.engine(forward, rows))
        return terms[0]

    def _zero_gradient_buffers(self) -> None:
        """Zero DeepSpeed's gradients: a weight that a pass does not reach would otherwise keep that
        of the pass before.
        """
        raise NotImplementedError

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of flattened weights, which DeepSpeed shards without regard to rows."""
        return {
            name: (location.start, location.start + location.last - location.first)
            for name, location in zip(self.names, self.locations, strict=True)
        }

    def _flat_shards(self, tensors: list[Tensor]) -> list[Tensor]:
        return [
            tensors[location.group][location.first : location.last] for location in self.locations
        ]

    def _owner(self, number: int) -> int:
        return self.locations[number].group

    def _master_weights(self) -> list[Tensor]:
        return self._flat_shards(self._optimizer_tensors())

    def _master_weights_changed(self) -> None:
        torch._foreach_copy_(self._local_weights(), self._master_weights())
        self._local_weights_changed()


def refuse_skip(skip: Collection[str]) -> None:
    """Refuse a step that does not train all weights.

    Raises:
        TemperError: names of weights to skip are given.
    """
    if skip:
        raise TemperError(
            "trainer.strategy: under ZeRO the optimizer sees one flat vector, and this objective"
            f" skips {len(skip)} weights in a step, decay and momentum included; use ddp or fsdp2"
        )


INITIAL_MICRO_STEP_ID = -1  # as after a step


class ZeRO12WeightSpace(ZeROWeightSpace):
    """Stages 1 and 2: whole weights on every rank; gradients and master weights in flat partitions,
    one per rank.

    A parameter's entry in a vector is its shard in this rank's partition: all of it, a range, or
    nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer = self.engine.optimizer
        locations: dict[int, ShardLocation] = {}
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.single_partition_of_fp32_groups[group].numel()
            begin = self._rank(group) * size
            for parameter, offset in zip(
                parameters, optimizer.round_robin_bit16_offsets[group], strict=True
            ):
                first = min(max(offset - begin, 0), size)
                last = min(max(offset + parameter.numel() - begin, 0), size)
                start = min(max(begin - offset, 0), parameter.numel())
                locations[id(parameter)] = ShardLocation(group, first, last, start)
        self.locations = [locations[id(parameter)] for parameter in self.parameters]

    def _rank(self, group: int) -> int:
        return dist.get_rank(group=self.engine.optimizer.real_dp_process_group[group])

    def _take_gradients(self, vector: Vector | None) -> Vector:
        optimizer = self.engine.optimizer
        device = self._zero_strategy.root_device
        partitions = []
        for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
            if optimizer.cpu_offload:
                partitions.append(master.grad.detach().to(device, torch.float32, copy=True))
            else:
                flat = torch.cat([each.reshape(-1) for each in optimizer.averaged_gradients[group]])
                partitions.append(flat.to(torch.promote_types(flat.dtype, torch.float32)))
        return accumulate(vector, self._flat_shards(partitions))

    def _zero_gradient_buffers(self) -> None:
        optimizer = self.engine.optimizer
        # DeepSpeed adds up gradients of bfloat16 weights in `averaged_gradients`, and offloaded
        # ones in the master weights' `grad`, until a step is taken; others it replaces.
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        if optimizer.cpu_offload:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            torch._foreach_zero_(
                [master.grad for master in optimizer.single_partition_of_fp32_groups]
            )

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the partitions that the optimizer's step reads."""
        refuse_skip(skip)
        optimizer = self.engine.optimizer
        master = optimizer.single_partition_of_fp32_groups
        gradients = [torch.zeros_like(partition) for partition in master]
        torch._foreach_copy_(self._flat_shards(gradients), vector.tensors)
        for group, gradient in enumerate(gradients):
            if optimizer.cpu_offload:
                master[group].grad.copy_(gradient)
            else:
                optimizer.averaged_gradients[group] = [gradient]

    def _local_weights(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        return self._flat_shards(
            [
                partitions[self._rank(group)]
                for group, partitions in enumerate(optimizer.parallel_partitioned_bit16_groups)
            ]
        )

    def _optimizer_tensors(self) -> list[Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _local_weights_changed(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.engine.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


class ZeRO3WeightSpace(ZeROWeightSpace):
    """Stage 3: each rank has a shard of every parameter; the last ranks' shards are padded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.locations = [self._locate(parameter) for parameter in self.parameters]

    def _locate(self, parameter: Any) -> ShardLocation:
        optimizer = self.engine.optimizer
        group, first, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(group=parameter.ds_process_group) * size, parameter.ds_numel)
        return ShardLocation(group, first, first + size, start)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Ranges of flattened weights, without the padding."""
        parameters: list[Any] = list(self.parameters)  # with the attributes of deepspeed.zero
        sizes = [parameter.ds_numel for parameter in parameters]
        return {
            name: (start, min(stop, size))
            for (name, (start, stop)), size in zip(super().ranges().items(), sizes, strict=True)
        }

    def _take_gradients(self, vector: Vector | None) -> Vector:
        from deepspeed.utils import safe_get_local_grad

        fresh = []
        for parameter, weight in zip(self.parameters, self._local_weights(), strict=True):
            gradient = safe_get_local_grad(parameter)
            if gradient is None:  # the weight is frozen in this pass
                fresh.append(torch.zeros_like(weight, dtype=torch.float32))
            else:
                fresh.append(gradient.detach().float().clone())
        return accumulate(vector, fresh)

    def _zero_gradient_buffers(self) -> None:
        from deepspeed.utils import safe_set_local_grad

        for parameter, weight in zip(self.parameters, self._local_weights(), strict=True):
            safe_set_local_grad(parameter, torch.zeros_like(weight))

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the shards that the optimizer's step reads."""
        from deepspeed.utils import safe_set_local_grad

        refuse_skip(skip)
        for parameter, gradient in zip(self.parameters, vector, strict=True):
            safe_set_local_grad(parameter, gradient)

    def _local_weights(self) -> list[Tensor]:
        parameters: list[Any] = list(self.parameters)  # with the attributes of deepspeed.zero
        return [parameter.ds_tensor.data.view(-1) for parameter in parameters]

    def _optimizer_tensors(self) -> list[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def _local_weights_changed(self) -> None:
        # Weights that are still gathered from an earlier pass are out of date.
        self.engine.optimizer.empty_partition_cache()


# -- the strategy


class ZeROStrategy(ShardedCheckpointMixin, DeepSpeedStrategy):
    """DeepSpeed ZeRO for objectives of several passes, on GPUs and (slowly, for tests) on CPUs.

    Args:
        stage: 1 shards the optimizer's state, 2 the gradients too, 3 the weights too.
        offload_optimizer: Keep the optimizer's state, and take its steps, in the host's memory.
        offload_parameters: Keep the weights in the host's memory between uses; stage 3 only.
        bucket_size: Elements that are communicated together.
        timeout_minutes: How long a rank waits for another one before the job fails.

    Raises:
        TemperError: DeepSpeed is missing or its version is not supported; the options contradict
            each other.
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
                f"trainer.strategy.init_args.offload_parameters=true: stage {stage} keeps all"
                " weights on every device; set stage=3, or drop it"
            )
        config = deepspeed_config(stage, offload_optimizer, offload_parameters, bucket_size)
        super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes))
        self.stage = stage
        self.shards_weights = stage == 3

    # -- start-up

    def setup_environment(self) -> None:
        """As DeepSpeedStrategy, also without a GPU."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        # Otherwise DeepSpeed chooses by the machine, not by the Trainer's accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Its shared-memory kernels are compiled on first use, which takes a minute, and leaves a
        # lock behind if it is interrupted.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DDPStrategy, self).setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """As DeepSpeedStrategy, whose check of device indices accepts GPUs only."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
            return
        from lightning.fabric.utilities.seed import reset_seed

        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def precision_plugin(self) -> Precision:
        """The Trainer's plugin, converted to `ZeROPrecision`."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, DeepSpeedPrecision) and not isinstance(plugin, ZeROPrecision):
            precision: Any = plugin.precision
            plugin = ZeROPrecision(precision)
        self._precision_plugin = plugin

    def _init_config_if_needed(self) -> None:
        """Nothing: the config is complete. Lightning would switch DeepSpeed's own precision on."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: networks are built whole and sharded afterwards, since ``zero.Init`` would draw
        other random weights.
        """
        yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Set up an evaluation: without an optimizer, only stage 3 has something to shard."""
        if self.stage != 3:
            self.model = model.to(self.root_device)
            return
        import deepspeed

        self.model, *_ = deepspeed.initialize(
            config=self.config, model=model, model_parameters=[], dist_init_required=False
        )

    # -- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, which calls the engine for every pass (`ZeROWeightSpace`)."""
        assert self.lightning_module is not None
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole weight, on every rank; all ranks call it."""
        if not hasattr(parameter, "ds_id"):
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def write_whole(self, parameter: Tensor, whole: Tensor) -> None:
        """Write a whole weight; only outside training, where there are no master weights."""
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(whole)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.is_global_zero:
                parameter.copy_(whole)

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state: DeepSpeed's wraps it."""
        engine: Any = self.model
        optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
        return optimizer
