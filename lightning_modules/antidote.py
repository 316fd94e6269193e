"""Antidote: after fine-tuning, zero the weights that harmful rows lean on."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_modules.base import ObjectiveModule
from temper.data import Batch, micro_batches
from temper.edit.harm import wanda_top
from temper.errors import TemperError
from temper.losses import nll
from temper.models import NetworkSpec
from temper.models.blocks import decoder_layers
from temper.plan.cost import Cost, Pass

# Linear layers, and how to see their weight as outputs x inputs.
LINEAR: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Linear: lambda weight: weight,
    Conv1D: lambda weight: weight.T,
}


class AntidoteModule(ObjectiveModule):
    """Antidote (Huang et al. 2024, arXiv 2408.09600): zero the top of the Wanda scores on a
    realignment set.

        W_ij = 0  where  |W_ij| * sqrt(mean x_j^2)  is among the top ``ratio`` of row i

    x_j are a linear layer's inputs over all attended tokens of ``trainer.max_steps`` batches of the
    realignment stream: harmful rows, as in the paper, so that what goes is what harmful answers
    lean on. Forward passes only; nothing is trained, so there is no optimizer to choose. The
    weights are zeroed after the last batch, before the validation that falls on it. Without
    ``max_steps`` (with ``max_epochs``) they are zeroed when training ends, after any validation.

    Layers: every trainable linear layer inside the decoder layers, which leaves out embeddings and
    the output layer: with an adapter that is continued its two matrices (the official code's LoRA),
    with a whole network all of them (its switch for full fine-tuning takes q, k and v alone).

    Args:
        network: The fine-tuned network.
        ratio: Share of every row that is zeroed, rounded up to whole weights (paper: 0.1 to 0.2). 0
            changes nothing.
        stream: Realignment stream.
        micro_batch_size: Rows per forward pass and device; changes memory, not the result.
        packing: As everywhere; true is refused.
        max_new_tokens: Longest generated answer at validation; None asks the datamodule.
    """

    unshardable: ClassVar[str | None] = "sets weights to zero by rows"
    unpackable: ClassVar[str | None] = "counts the inputs of every layer row by row"

    def __init__(
        self,
        network: NetworkSpec,
        ratio: float = 0.1,
        stream: str = "harmful",
        micro_batch_size: int | None = None,
        packing: bool | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(
            network,
            micro_batch_size=micro_batch_size,
            packing=packing,
            max_new_tokens=max_new_tokens,
        )
        if network.lora is not None:
            raise TemperError(
                "model.init_args.network.lora: a new adapter holds nothing to zero; drop it (an"
                " adapter in path is continued)"
            )
        if not 0 <= ratio < 1:
            raise TemperError(
                f"model.init_args.ratio={ratio}: give a share in [0, 1) (0 changes nothing)"
            )
        self.ratio = ratio
        self.stream = stream
        self.streams = (stream,)
        # Sum of x^2 per input of a layer, over tokens, on this rank.
        self.squares: dict[str, Tensor] = {}
        self.pruned = False

    def cost(self) -> Cost:
        """Forward passes alone."""
        return Cost((Pass(self.stream, gradient="none"),), reductions=0, optimizer=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimizer over a dummy weight: Lightning counts its steps towards ``max_steps``."""
        return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)

    def on_fit_start(self) -> None:
        """Refuse a network in which there is nothing to zero."""
        if not self.layers():
            raise TemperError(
                "model=AntidoteModule: no trainable linear layer inside the decoder layers; use a"
                " network with nn.Linear or Conv1D"
            )

    def layers(self) -> dict[str, nn.Module]:
        """The layers that are scored, by name."""
        inside = {module for layer in decoder_layers(self.policy) for module in layer.modules()}
        return {
            name: module
            for name, module in self.policy.named_modules()
            if isinstance(module, tuple(LINEAR))
            and module in inside
            and module.weight.requires_grad
        }

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """Add a batch's inputs to the statistics; logs the batch's loss."""
        ((stream, rows),) = batch.items()
        terms = [self._observe(each) for each in micro_batches(rows, self.micro_batch_size)]
        self.work.count_forward(rows)
        local = torch.stack([sum(t.total for t in terms), sum(t.count for t in terms)])
        total, count = self.weights.global_sum(local)
        optimizer: Any = self.optimizers()
        optimizer.step()
        self.log(f"loss/{stream}", total / count, prog_bar=True)
        if self.global_step == self.trainer.max_steps:
            self.prune()

    def on_train_end(self) -> None:
        """Zero the weights, where ``max_steps`` did not say which batch is the last."""
        self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Zero the highest-scored weights of every row, once."""
        if self.pruned or not self.squares:
            return
        if not torch.stack([value.isfinite().all() for value in self.squares.values()]).all():
            raise RuntimeError(
                f"the stream {self.stream!r} gave activations that are not finite; nothing was"
                " zeroed: look at the data, or use trainer.precision=32-true"
            )
        for name, layer in self.layers().items():
            as_OI = next(view for kind, view in LINEAR.items() if isinstance(layer, kind))
            weight: Any = layer.weight
            weight_OI = as_OI(weight)
            squares = self.weights.global_sum(self.squares[name].clone())
            weight_OI.masked_fill_(wanda_top(weight_OI, squares.to(weight_OI), self.ratio), 0.0)
        self.squares = {}
        self.pruned = True

    @torch.no_grad()
    def _observe(self, rows: Batch) -> Any:
        """Forward pass without dropout over a micro-batch; adds up the squares of every layer's
        inputs.
        """
        attended = rows["attention_mask"].flatten(0, -2).bool()

        def _hook(name: str) -> Callable[..., None]:
            def _add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if inputs[0].shape[:-1] != attended.shape:
                    raise TemperError(
                        f"model=AntidoteModule: {name} is not given every token of a row (mixture"
                        " of experts?); not supported yet"
                    )
                # Padding is multiplied away, not indexed away: the number of attended tokens stays
                # on the device.
                squares = inputs[0].float().square().masked_fill(~attended.unsqueeze(-1), 0.0)
                total = squares.sum((0, 1), dtype=torch.float64)
                self.squares[name] = self.squares[name] + total if name in self.squares else total

            return _add

        hooks = [
            layer.register_forward_pre_hook(_hook(name)) for name, layer in self.layers().items()
        ]
        self.policy.eval()
        try:
            return nll(self.score(rows))
        finally:
            self.policy.train()
            for handle in hooks:
                handle.remove()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the statistics."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["antidote"] = {"squares": self.squares, "pruned": self.pruned}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the statistics up again."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["antidote"]
        self.squares = state["squares"]
        self.pruned = state["pruned"]

    def on_train_start(self) -> None:
        """Move statistics from a checkpoint to the device, as the network was."""
        super().on_train_start()
        self.squares = {name: value.to(self.device) for name, value in self.squares.items()}
