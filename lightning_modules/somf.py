"""SOMF: fuse a user's fine-tuning with a safe model through a mask trained on preference data."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_modules.base import ObjectiveModule
from lightning_modules.dpo import DPOModule
from temper.data import Batch
from temper.edit.harm import fuse, relaxed_bernoulli
from temper.errors import TemperError
from temper.models import NetworkSpec, build_network
from temper.models.load import check_network
from temper.plan.cost import Cost


class Fusion(nn.Module):
    """``safe + w * m * tau / mean(m)`` as a parametrization whose parameter is the mask's logits.

    m is a relaxed Bernoulli sample in training, the same in every pass of a step, and
    ``sigmoid(logits)`` otherwise.

    Args:
        safe: Weight of the safe model.
        tau: Task vector.
        w: Strength of the task vector.
        temperature: Of the samples.
        seed: Seeds of the samples: the run's, and the number of this weight.
    """

    safe: Tensor
    tau: Tensor

    def __init__(
        self, safe: Tensor, tau: Tensor, w: float, temperature: float, seed: tuple[int, int]
    ) -> None:
        super().__init__()
        # Not in checkpoints: they are read from the two folders again.
        self.register_buffer("safe", safe, persistent=False)
        self.register_buffer("tau", tau, persistent=False)
        self.w = w
        self.temperature = temperature
        self.seed = seed
        self.step = 0

    def forward(self, logits: Tensor) -> Tensor:
        """The fused weight."""
        mask = self.sample(logits) if self.training else logits.sigmoid()
        return fuse(self.safe, self.tau, mask, self.w)

    def sample(self, logits: Tensor) -> Tensor:
        """This step's mask: the same on every rank and in every micro-batch."""
        sequence = np.random.SeedSequence([*self.seed, self.step])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        device = logits.device
        generator = torch.Generator(device).manual_seed(seed)
        uniform = torch.rand(logits.shape, generator=generator, device=device, dtype=logits.dtype)
        return relaxed_bernoulli(logits, uniform, self.temperature)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Where the logits begin: 0, every mask 1/2."""
        return torch.zeros_like(weight)


class SOMFModule(DPOModule):
    """Subspace-oriented model fusion (Yi et al. 2024, arXiv 2405.09055), for one task vector.

        theta = theta_safe + w * m * tau / mean(m)
        tau   = theta_task - theta_safe,   m ~ RelaxedBernoulli(logits, T)

    One logit per weight, mean(m) per tensor as in the official code; the logits alone are trained,
    by DPO on safety pairs. Evaluation and export use ``m = sigmoid(logits)``; when training ends
    the fused weights replace the masks, so the export is an ordinary model. The reference model is
    the fusion at the start, where m / mean(m) = 1: the policy as training finds it. The official
    code masks LoRA weights; here all weights that differ are masked.

    Memory: the network, its logits, theta_safe, tau, the reference, and the optimizer's state of
    the logits.

    Args:
        network: theta_task, the fine-tuned model; ``network.path`` must be given.
        safe: Folder of theta_safe, the aligned model that the fine-tuning began from.
        w: Strength of the task vector (paper: 0.3).
        temperature: Of the mask's samples (official code: 0.5).
        mask_seed: Seed of the mask's samples.
        kwargs: See `DPOModule`.

    Raises:
        TemperError: a folder that is missing, adapters, low precision, or two models that are not
            the same network.
    """

    unshardable: ClassVar[str | None] = "trains masks in the place of weights"

    def __init__(
        self,
        network: NetworkSpec,
        safe: str,
        w: float = 0.3,
        temperature: float = 0.5,
        mask_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if not w >= 0:
            raise TemperError(f"model.init_args.w={w}: give a number >= 0 (0 is the safe model)")
        if not temperature > 0:
            raise TemperError(
                f"model.init_args.temperature={temperature}: give a number > 0 (towards 0, masks"
                " are 0 or 1)"
            )
        if network.path is None:
            raise TemperError(
                "model.init_args.network.path=null: SOMF starts from a fine-tuned model; give its"
                " export/ folder"
            )
        if network.lora is not None or network.dtype != "float32":
            raise TemperError(
                "model.init_args.network: SOMF trains masks over whole float32 weights; drop lora,"
                " set dtype=float32"
            )
        self.safe_spec = NetworkSpec(path=safe, adapter="merge")
        self._checked(lambda: check_network(self.safe_spec))
        self.w = w
        self.temperature = temperature
        self.mask_seed = mask_seed
        # Module, weight and fusion; a tied weight has several sites.
        self.sites: list[tuple[nn.Module, str, Fusion]] = []
        self.baked = False

    def configure_model(self) -> None:
        """Build both models and fuse them with even masks; take the reference from that; insert the
        masks.
        """
        if self.sites or self.baked:
            return
        ObjectiveModule.configure_model(self)
        fused = self._fuse_evenly(self.safe_network())
        super().configure_model()
        self._insert_masks(fused)

    def safe_network(self) -> nn.Module:
        """theta_safe."""
        tokenizer = self.datamodule.tokenizer
        network: nn.Module = self._checked(lambda: build_network(self.safe_spec, tokenizer))
        return network

    @torch.no_grad()
    def _fuse_evenly(self, safe_network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Set the network to ``theta_safe + w * tau``; returns theta_safe and tau of every weight
        that differs.
        """
        task = dict(self.policy.named_parameters())
        safe = dict(safe_network.named_parameters())
        if any("lora_" in name for name in task):
            raise TemperError(
                "model.init_args.network.path holds an adapter: set"
                " model.init_args.network.adapter=merge"
            )
        wrong = [
            name
            for name in {**task, **safe}
            if name not in task or name not in safe or task[name].shape != safe[name].shape
        ]
        if wrong:
            raise TemperError(
                f"model.init_args.safe={self.safe_spec.path}: not the network of network.path,"
                f" first at {wrong[0]}"
            )
        differing = {
            name: (s.detach().clone(), p - s)
            for name, p in task.items()
            if not torch.equal(p, s := safe[name].to(p))
        }
        if not differing:
            raise TemperError(
                f"model.init_args.safe={self.safe_spec.path}: the same weights as network.path;"
                " give the model before fine-tuning"
            )
        for name, (s, tau) in differing.items():
            task[name].copy_(fuse(s, tau, torch.full_like(tau, 0.5), self.w))
        return differing

    def _insert_masks(self, fused: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Make the masks' logits the network's only trainable parameters."""
        self.policy.requires_grad_(False)
        names = {id(p): name for name, p in self.policy.named_parameters()}
        places = [
            (module, own, p)
            for module in self.policy.modules()
            for own, p in module.named_parameters(recurse=False)
        ]
        fusions = {
            name: Fusion(safe, tau, self.w, self.temperature, (self.mask_seed, number))
            for number, (name, (safe, tau)) in enumerate(fused.items())
        }
        for module, own, parameter in places:
            if fusion := fusions.get(names[id(parameter)]):
                parametrize.register_parametrization(
                    module, own, fusion.train(self.policy.training)
                )
                parameter.requires_grad_(True)  # the same tensor, which now holds the logits
                self.sites.append((module, own, fusion))

    def cost(self) -> Cost:
        """DPO's, plus theta_safe, tau and the fused weights of a pass."""
        return replace(super().cost(), copies=self.reference_copies() + 3)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step of DPO on the logits, with this step's masks; logs as `DPOModule`."""
        for _, _, fusion in self.sites:
            fusion.step = self.global_step
        super().training_step(batch, batch_idx)

    def generate(self, batch: Batch) -> Tensor:
        """Greedy answers, with the weights fused once and not for every token."""
        with parametrize.cached():
            return super().generate(batch)

    def on_train_end(self) -> None:
        """Replace the masks by the fused weights."""
        self.bake()

    @torch.no_grad()
    def bake(self) -> None:
        """Turn the network into an ordinary one: ``theta_safe + w * m * tau / mean(m)`` with
        ``m = sigmoid(logits)``.
        """
        finals = {}
        for module, own, fusion in self.sites:
            finals[fusion] = fusion.eval()(module.parametrizations[own].original)  # type: ignore[union-attr,index]
        for module, own, fusion in self.sites:
            parametrize.remove_parametrizations(module, own, leave_parametrized=False)
            getattr(module, own).copy_(finals[fusion])
        self.sites = []
        self.baked = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the masks' logits; refused once they are fused into the weights."""
        if self.baked:
            raise RuntimeError(
                "a checkpoint was requested after training: the masks are fused into the weights;"
                " save during training, or export"
            )
        super().on_save_checkpoint(checkpoint)

    @staticmethod
    def _checked(build: Any) -> Any:
        """Call ``build``; errors about the safe folder name its own flag."""
        try:
            return build()
        except TemperError as error:
            message = str(error).replace("model.init_args.network.path", "model.init_args.safe")
            raise TemperError(message) from None
