"""T-Vaccine: Vaccine on the layers that harmful fine-tuning would change most."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.perturbation import output_gradients, perturbed_gradient
from lightning_modules.vaccine import VaccineModule, vaccine_passes
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec
from temper.models.blocks import decoder_layers
from temper.plan.cost import Cost, Pass


class TVaccineModule(VaccineModule):
    """T-Vaccine (Liu et al. 2024, arXiv 2410.09760, algorithm 1).

        s_l = ||d h / d o_l||
        S   = n_layers of the layers, drawn without replacement with probability s / sum(s)

    h is the NLL of one batch of the harmful stream, ``o_l`` the output of the attention block of
    layer l. Importances s are measured before steps 0, K, 2K, ..., layers are drawn before steps 0,
    J, 2J, ...; K need not be a multiple of J. In between, Vaccine's step perturbs the layers in S
    alone (the norm is taken over them) and trains their weights; the weights of other layers get no
    gradient, no decay and no momentum. Weights outside the decoder layers are always trained. With
    all layers it is Vaccine.

    Two passes per step and one more every K steps, after which importances go to the host: the one
    synchronisation beyond that of `apply_gradient`.

    Args:
        network: Where the network comes from.
        rho: L2 norm of the perturbation of a whole batch (paper: 3).
        n_layers: Layers that are perturbed and trained at a time, S (paper: 8).
        importance_every: Steps between measurements of the importances, K (paper: 200).
        sample_every: Steps between draws of the layers, J (paper: 20).
        seed: Seed of the draws.
        kwargs: See `ObjectiveModule`.
    """

    streams = ("alignment", "harmful")

    def __init__(
        self,
        network: NetworkSpec,
        rho: float = 3.0,
        n_layers: int = 8,
        importance_every: int = 200,
        sample_every: int = 20,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, rho, **kwargs)
        for flag, value in (
            ("n_layers", n_layers),
            ("importance_every", importance_every),
            ("sample_every", sample_every),
        ):
            if value < 1:
                raise TemperError(f"model.init_args.{flag}={value}: give a whole number >= 1")
        if seed < 0:
            raise TemperError(f"model.init_args.seed={seed}: give a whole number >= 0")
        self.n_layers = n_layers
        self.importance_every = importance_every
        self.sample_every = sample_every
        self.seed = seed
        self.importance_L: Tensor | None = None
        self.chosen: list[int] = []

    def configure_model(self) -> None:
        """Build the network; refuse to choose more layers than it has."""
        super().configure_model()
        self.layers = decoder_layers(self.policy)
        if self.n_layers > len(self.layers):
            raise TemperError(
                f"model.init_args.n_layers={self.n_layers}: the network has {len(self.layers)}"
                " decoder layers; give at most that (all of them is Vaccine)"
            )

    def cost(self) -> Cost:
        """Vaccine's two passes on some layers, and every K steps the one that measures them all."""
        measure = Pass("harmful", 1 / self.importance_every, gradient="outputs", outputs="all")
        return Cost((measure, *vaccine_passes(self.n_layers)))

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """Vaccine's step on the chosen layers, which are drawn anew every J steps."""
        norms = []
        if self.global_step % self.importance_every == 0:
            norms.append(self._measure(batch["harmful"]))
        if self.global_step % self.sample_every == 0:
            self.chosen = self._draw(self.global_step)
        skipped = self._skipped()
        blocks = [self.attention[layer] for layer in self.chosen]
        with self.weights.frozen(skipped.values()):
            found = perturbed_gradient(self, blocks, batch["alignment"], self.rho)
        self.apply_gradient(found.gradient, found.norm, *norms, skip=skipped.keys())
        self.log("loss/alignment", found.loss, prog_bar=True)
        self.log_dict(found.metrics)

    def _measure(self, harmful: Batch) -> Tensor:
        """Measure the importances; returns their norm, which must be finite for the step to be
        taken.
        """
        found = output_gradients(self, self.attention, harmful)
        importance_L = found.norms_L.cpu().double()
        # What is not finite is not kept: the step is skipped, and the next one measures again.
        if torch.isfinite(importance_L).all():
            self.importance_L = importance_L
            total = importance_L.sum().clamp_min(torch.finfo(torch.float64).tiny)
            for layer, share in enumerate((importance_L / total).tolist()):
                self.log(f"t_vaccine/importance_{layer}", share)
        return found.norm

    def _draw(self, step: int) -> list[int]:
        """Layers from this step on: the same on every rank, and after a resume."""
        importance_L = self.importance_L
        if importance_L is None:
            importance_L = torch.ones(len(self.layers), dtype=torch.float64)
        # Layers without any gradient are drawn last, not never: without replacement they may be
        # needed.
        floor = importance_L.max().clamp_min(torch.finfo(torch.float64).tiny) * 1e-12
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        weights_L = importance_L.clamp_min(floor)
        drawn = torch.multinomial(weights_L, self.n_layers, generator=generator)
        return sorted(drawn.tolist())

    def _skipped(self) -> dict[str, nn.Parameter]:
        """Trainable weights of the layers that were not chosen, by name."""
        trained = {id(p) for layer in self.chosen for p in self.layers[layer].parameters()}
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        named = zip(self.weights.names, self.weights.parameters, strict=True)
        return {name: p for name, p in named if id(p) in inside and id(p) not in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the importances and the chosen layers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["t_vaccine"] = {"importance": self.importance_L, "chosen": self.chosen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the same layers until the next draw."""
        super().on_load_checkpoint(checkpoint)
        if state := checkpoint.get("t_vaccine"):
            self.importance_L = state["importance"]
            self.chosen = state["chosen"]
