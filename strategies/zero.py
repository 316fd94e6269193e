"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and weights (3) are cut into one part per
rank.
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

from strategies.parts import PartsCheckpoints
from strategies.sharded import ShardedWeightSpace
from strategies.weight_space import Loss, Vector, accumulated
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms
from temper.packages import check_deepspeed

# MERGED from strategies.zero: DeepSpeed's settings and precision under Temper.


class ZeROPrecision(DeepSpeedPrecision):
    """Precision as under the other strategies: autocast for ``bf16-mixed``, nothing is converted
    behind the user's back.

    DeepSpeed's own bf16 mode would turn float32 adapters into bfloat16 ones, which a displacement
    of weights cannot move.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast for ``bf16-true`` alone: DeepSpeed's ``32-true`` would make a bfloat16 base twice
        its size.
        """
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
        # Lightning's own, which keeps no cache: that would hand the weights of the first pass to a
        # pass at displaced ones.
        return MixedPrecision(
            "bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu"
        ).forward_context()


def settings(
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
        zero |= {
            "stage3_prefetch_bucket_size": bucket_size,
            "stage3_param_persistence_threshold": 0,
        }
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


# MERGED from strategies.zero: What the weight spaces of all ZeRO stages have in common. |  | What
# is used of DeepSpeed beyond its interface is listed in zero12.py and zero3.py;
# `strategies.zero.check_deepspeed` | keeps other versions out, and two-process tests compare every
# stage with one process.


@dataclass(frozen=True)
class Place:
    """Where a rank's piece of a parameter is.

    Attributes:
        group: Which flat part.
        first: First element there.
        last: The element after the last.
        start: The piece's first element in the flattened parameter.
    """

    group: int
    first: int
    last: int
    start: int


class ZeROWeightSpace(ShardedWeightSpace):
    """What the stages share: each pass goes through the engine, once forward and once backward.

    DeepSpeed does not add up the gradients of several backward passes without a word; each is taken
    out at once.
    """

    places: list[Place]

    @property
    def engine(self) -> Any:
        """DeepSpeed's wrapper around the module."""
        return self.strategy.model  # type: ignore[union-attr]

    def _pass(self, loss: Loss, rows: Batch) -> MeanTerms:
        found: list[MeanTerms] = []

        def forward(part: Batch) -> Tensor:
            # Again: the engine switches off an autocast that it was not told of.
            with self.strategy.precision_plugin.forward_context():  # type: ignore[union-attr]
                found.append(loss(part))
            return found[-1].total

        self.engine.optimizer.zero_grad()
        self._forget_gradients()
        self.engine.backward(self.engine(forward, rows))
        return found[0]

    def _forget_gradients(self) -> None:
        """Zero what holds gradients: a weight that a pass does not reach would show that of the
        pass before.
        """

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Of flattened weights, which DeepSpeed cuts without regard to rows."""
        return {
            name: (place.start, place.start + place.last - place.first)
            for name, place in zip(self.names, self.places, strict=True)
        }

    def _pieces(self, likes: list[Tensor]) -> list[Tensor]:
        return [likes[place.group][place.first : place.last] for place in self.places]

    def _owner(self, number: int) -> int:
        return self.places[number].group

    def _exact(self) -> list[Tensor]:
        return self._pieces(self._optimized())

    def _adopt(self) -> None:
        torch._foreach_copy_(self._held(), self._exact())
        self._written()


def refuse_skip(skip: Collection[str]) -> None:
    """Refuse to leave weights out of a step.

    Raises:
        TemperError: there are some to leave out.
    """
    if skip:
        raise TemperError(
            "trainer.strategy: under ZeRO the optimizer sees one flat vector, and this objective"
            f" leaves {len(skip)} weights out of steps, decay and momentum included; use ddp or"
            " fsdp2"
        )


# MERGED from strategies.zero: Weight space of DeepSpeed ZeRO, stages 1 and 2. |  | Of
# `DeepSpeedZeroOptimizer` it uses ``averaged_gradients``, ``single_partition_of_fp32_groups``,
# ``parallel_partitioned_bit16_groups``, | ``bit16_groups_flat``, ``round_robin_bit16_groups`` and
# ``_offsets``, ``real_dp_process_group``, ``cpu_offload``, | ``micro_step_id`` (0.19).


INITIAL_MICRO_STEP_ID = -1  # as after a step


class ZeRO12WeightSpace(ZeROWeightSpace):
    """Stages 1 and 2: all weights on every rank, gradients and exact weights in flat parts, one per
    rank.

    A parameter's entry in a vector is what of it lies in this rank's part: all, a piece, or
    nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        optimizer = self.engine.optimizer
        places: dict[int, Place] = {}
        for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
            size = optimizer.single_partition_of_fp32_groups[group].numel()
            begin = self._rank(group) * size
            for parameter, offset in zip(
                parameters, optimizer.round_robin_bit16_offsets[group], strict=True
            ):
                first, last = (
                    min(max(place - begin, 0), size)
                    for place in (offset, offset + parameter.numel())
                )
                start = min(max(begin - offset, 0), parameter.numel())
                places[id(parameter)] = Place(group, first, last, start)
        self.places = [places[id(parameter)] for parameter in self.parameters]

    def _rank(self, group: int) -> int:
        return dist.get_rank(group=self.engine.optimizer.real_dp_process_group[group])

    def _take_gradients(self, vector: Vector | None) -> Vector:
        optimizer = self.engine.optimizer
        parts = []
        for group, exact in enumerate(optimizer.single_partition_of_fp32_groups):
            if optimizer.cpu_offload:
                parts.append(
                    exact.grad.detach().to(self.strategy.root_device, torch.float32, copy=True)
                )  # type: ignore[union-attr]
            else:
                flat = torch.cat(
                    [piece.reshape(-1) for piece in optimizer.averaged_gradients[group]]
                )
                parts.append(flat.to(torch.promote_types(flat.dtype, torch.float32)))
        return accumulated(vector, self._pieces(parts))

    def _forget_gradients(self) -> None:
        optimizer = self.engine.optimizer
        # Gradients of bfloat16 weights add up here, and offloaded ones there, until a step is
        # taken; others do not.
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
        if optimizer.cpu_offload:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            torch._foreach_zero_(
                [exact.grad for exact in optimizer.single_partition_of_fp32_groups]
            )

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the parts that the optimizer's step reads."""
        refuse_skip(skip)
        optimizer = self.engine.optimizer
        exact = optimizer.single_partition_of_fp32_groups
        parts = [torch.zeros_like(part) for part in exact]
        torch._foreach_copy_(self._pieces(parts), vector.tensors)
        for group, part in enumerate(parts):
            if optimizer.cpu_offload:
                exact[group].grad.copy_(part)
            else:
                optimizer.averaged_gradients[group] = [part]

    def _held(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        return self._pieces(
            [
                parts[self._rank(group)]
                for group, parts in enumerate(optimizer.parallel_partitioned_bit16_groups)
            ]
        )

    def _optimized(self) -> list[Tensor]:
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _written(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self.engine.optimizer
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )


# MERGED from strategies.zero: Weight space of DeepSpeed ZeRO, stage 3. |  | Of
# `DeepSpeedZeroOptimizer_Stage3` it uses ``grad_position``, ``fp32_partitioned_groups_flat``,
# ``empty_partition_cache``; of a parameter | ``ds_tensor``, ``ds_numel``, ``ds_process_group``; and
# the local getters and setters of ``deepspeed.utils`` (0.19).


class ZeRO3WeightSpace(ZeROWeightSpace):
    """Stage 3: each rank has its slice of every parameter, the last ranks' padded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.places = [self._place(parameter) for parameter in self.parameters]

    def _place(self, parameter: Any) -> Place:
        optimizer = self.engine.optimizer
        group, first, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(group=parameter.ds_process_group) * size, parameter.ds_numel)
        return Place(group, first, first + size, start)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """Without the padding."""
        sizes = [parameter.ds_numel for parameter in self.parameters]  # type: ignore[attr-defined]
        return {
            name: (start, min(stop, size))
            for (name, (start, stop)), size in zip(super().ranges().items(), sizes, strict=True)
        }

    def _take_gradients(self, vector: Vector | None) -> Vector:
        from deepspeed.utils import safe_get_local_grad

        fresh = []
        for parameter, held in zip(self.parameters, self._held(), strict=True):
            gradient = safe_get_local_grad(
                parameter
            )  # none where the weight is frozen for the moment
            fresh.append(
                torch.zeros_like(held, dtype=torch.float32)
                if gradient is None
                else gradient.detach().float().clone()
            )
        return accumulated(vector, fresh)

    def _forget_gradients(self) -> None:
        from deepspeed.utils import safe_set_local_grad

        for parameter, held in zip(self.parameters, self._held(), strict=True):
            safe_set_local_grad(parameter, torch.zeros_like(held))

    def assign(self, vector: Vector, skip: Collection[str] = ()) -> None:
        """Write into the slices that the optimizer's step reads."""
        from deepspeed.utils import safe_set_local_grad

        refuse_skip(skip)
        for parameter, gradient in zip(self.parameters, vector, strict=True):
            safe_set_local_grad(parameter, gradient)

    def _held(self) -> list[Tensor]:
        return [parameter.ds_tensor.data.view(-1) for parameter in self.parameters]  # type: ignore[attr-defined]

    def _optimized(self) -> list[Tensor]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def _written(self) -> None:
        # What was gathered for a pass and not given back yet holds the weights of before.
        self.engine.optimizer.empty_partition_cache()


class ZeROStrategy(PartsCheckpoints, DeepSpeedStrategy):
    """DeepSpeed ZeRO for objectives of several passes, on GPUs and (slowly, for tests) on CPUs.

    Args:
        stage: 1 cuts the optimizer's state, 2 its gradients too, 3 the weights too.
        offload_optimizer: Keep the optimizer's state, and take its steps, in the host's memory.
        offload_parameters: Keep the weights in the host's memory between uses; stage 3 alone.
        bucket_size: Elements that are sent together.
        timeout_minutes: How long a rank waits for another one before the job fails.

    Raises:
        TemperError: DeepSpeed is missing, or of a version that this was not written for; options
            that contradict each other.
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
        config = settings(stage, offload_optimizer, offload_parameters, bucket_size)
        super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes))
        self.stage, self.shards_weights = stage, stage == 3

    # -- start-up

    def setup_environment(self) -> None:
        """As DeepSpeedStrategy, also without a GPU."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # otherwise DeepSpeed asks the machine, not the Trainer
        import deepspeed

        # Its shared-memory kernels are compiled on first use: a minute, and a lock that stays if
        # that is interrupted.
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
        is_deepspeeds = isinstance(plugin, DeepSpeedPrecision) and not isinstance(
            plugin, ZeROPrecision
        )
        self._precision_plugin = ZeROPrecision(plugin.precision) if is_deepspeeds else plugin  # type: ignore[union-attr]

    def _init_config_if_needed(self) -> None:
        """Nothing: the config is complete. Lightning would switch DeepSpeed's own precision on."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Networks are built whole and cut afterwards: built under ``zero.Init``, random weights
        are others.
        """
        yield

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[
                parameter for parameter in model.parameters() if parameter.requires_grad
            ],
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

        self.model, *_ = deepspeed.initialize(
            config=self.config, model=model, model_parameters=[], dist_init_required=False
        )

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
