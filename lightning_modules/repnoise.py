"""RepNoise: turn the representations of harmful answers into noise."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.base import ObjectiveModule
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import IGNORE_INDEX, MeanTerms, Scores
from temper.losses.mmd import gaussian_mmd
from temper.models import NetworkSpec
from temper.models.blocks import mlp_blocks
from temper.models.capture import exact, record_outputs
from temper.models.lens import final_norm_and_head, lens_nll
from temper.plan.cost import Cost, Pass

Ascent = Literal["log", "log1p"]
ASCENT: dict[str, Callable[[Tensor], Tensor]] = {"log": torch.log, "log1p": torch.log1p}


class RepNoiseModule(ObjectiveModule):
    """RepNoise (Rosati et al. 2024, arXiv 2405.14577).

        L = NLL(alignment) + beta * mean_l MMD(M h_l, M e_l)
            - alpha * log(mean_l NLL(head(norm(h_l))))

    h_l are the hidden states of harmful answers, e_l standard Gaussian noise, M the positions where
    a harmful answer differs from the refusal paired with it. The MMD (`gaussian_mmd`) is over the
    rows of the harmful batch, each a masked sequence of hidden states written as one vector. The
    last term reads every hidden state, that of the embeddings included, through the network's own
    final norm and output layer, and counts the labelled tokens within M.

    The released code differs from the paper's equation, and from this, in five places: it takes
    ``log(1 + mean)`` (``ascent=log1p``), measures the MMD at the outputs of the MLP blocks
    (``noise_at=mlp``), and, not offered, adds the last layer's NLL to the mean twice, the second
    time with the final norm applied twice over, sets logits outside M to zero, so that the first
    token of each stretch of M has a uniform prediction, and counts padding. Its harmless NLL is on
    the paired refusals alone; here it is on the alignment stream.

    The MMD and the logarithm belong to a whole batch, so that micro-batches and several ranks are
    refused.

    Args:
        network: Where the network comes from.
        alpha: Weight of the ascent on harmful answers (paper: 1).
        beta: Weight of the noise term (paper: 0.001).
        ascent: ``log`` of the mean NLL, as in the paper, or ``log1p``, as in the released code,
            whose gradient stays bounded where the NLL is small.
        noise_at: The activations that become noise: hidden states after the ``layers`` (of the last
            one, after the final norm), or outputs of the ``mlp`` blocks.
        seed: Seed of the noise; every step has its own.
        kwargs: See `ObjectiveModule`.

    Raises:
        TemperError: micro_batch_size is set; more than one rank; the stream ``harmful_pairs`` does
            not hold pairs of answers to one prompt each; the network has no logit lens. All before
            training.
    """

    streams = ("alignment", "harmful_pairs")

    def __init__(
        self,
        network: NetworkSpec,
        alpha: float = 1.0,
        beta: float = 0.001,
        ascent: Ascent = "log",
        noise_at: Literal["layers", "mlp"] = "layers",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        for flag, value in (("alpha", alpha), ("beta", beta), ("seed", seed)):
            if not value >= 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a number >= 0")
        for flag, name, known in (
            ("ascent", ascent, tuple(ASCENT)),
            ("noise_at", noise_at, ("layers", "mlp")),
        ):
            if name not in known:
                raise TemperError(f"model.init_args.{flag}={name}: give one of {', '.join(known)}")
        if self.micro_batch_size is not None:
            raise TemperError(
                f"model.init_args.micro_batch_size={self.micro_batch_size}: RepNoise's noise term"
                " is a statistic of the whole harmful batch; set it to null, and lower the batch"
                " sizes of the data if memory is short"
            )
        self.alpha = alpha
        self.beta = beta
        self.ascent = ascent
        self.noise_at = noise_at
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Refuse several ranks: each would see only its share of the harmful batch."""
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            raise TemperError(
                f"trainer: {self.trainer.world_size} ranks, and RepNoise's noise term is a"
                " statistic of the whole harmful batch; use trainer.devices=1 and"
                " trainer.num_nodes=1"
            )

    def on_fit_start(self) -> None:
        """Check the pairs, and find the modules that the logit lens reads through."""
        source = self.datamodule.sources.get("harmful_pairs")
        if source is not None:  # the loader refuses data without the stream, and lists theirs
            check_pairs(source.batch(0), "harmful_pairs")
        # A tuple, so that its modules are not registered as submodules of this one.
        self.lens = final_norm_and_head(self.policy) if self.alpha else None

    def cost(self) -> Cost:
        """A pass over each stream; the harmful one with the logits of every hidden state."""
        alignment = Pass("alignment")
        if self.alpha == self.beta == 0:
            return Cost((alignment,))
        return Cost((alignment, Pass("harmful_pairs", vectors=1, lens=self.alpha > 0)))

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step; logs the alignment loss, the MMD and the NLL that is driven up."""
        weight = float(self.alpha > 0 or self.beta > 0)
        (loss, _), gradient = self.weighted_gradient(
            (1.0, batch["alignment"], None),
            (weight, harmful_rows(batch["harmful_pairs"]), self.harmful_terms),
        )
        self.apply_gradient(gradient)
        self.log("loss/alignment", loss, prog_bar=True)

    def harmful_terms(self, rows: Batch) -> MeanTerms:
        """``beta * mean_l MMD - alpha * log(mean_l NLL)`` of rows made by `harmful_rows`."""
        scores, noised = self._forward(rows)
        total = scores.logps.new_zeros(())
        if self.beta:
            mmd = self._mmd(noised, rows["differs"])
            total = total + self.beta * mmd
            self.log_mean("repnoise/mmd", mmd)
        if self.alpha:
            assert scores.hidden is not None and self.lens is not None
            terms = lens_nll(scores.hidden, rows["labels"], *self.lens, self.fused_loss)
            harmful = terms.total / terms.count
            total = total - self.alpha * ASCENT[self.ascent](harmful)
            self.log_mean("repnoise/harmful_nll", harmful)
        return MeanTerms(total, torch.ones((), device=total.device))

    def _forward(self, rows: Batch) -> tuple[Scores, list[Tensor]]:
        """Scores of the harmful answers, and the activations that are to become noise, by layer."""
        if self.noise_at == "mlp":
            with record_outputs(mlp_blocks(self.policy)) as outputs:
                return self.score(rows, hidden=True), outputs
        scores = self.score(rows, hidden=True)
        assert scores.hidden is not None
        return scores, list(scores.hidden[1:])

    def _mmd(self, activations: list[Tensor], differs_BT: Tensor) -> Tensor:
        """Mean over layers of the MMD to noise, which depends on seed and step alone."""
        device = differs_BT.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.global_step)
        mask_BT1 = differs_BT[..., None]
        distances = []
        for hidden in activations:
            states = exact(hidden)
            noise = torch.randn(
                states.shape, generator=generator, device=device, dtype=states.dtype
            )
            masked = (states * mask_BT1).flatten(1), (noise * mask_BT1).flatten(1)
            distances.append(gaussian_mmd(*masked))
        return torch.stack(distances).mean()


def harmful_rows(pairs: Batch) -> Batch:
    """The harmful answers of pairs, with a mask ``differs`` (``B x T``) of the tokens in which they
    differ from the paired refusal.

    Labels are kept there alone. Padding never differs; a token beside the padding of a shorter
    refusal does.
    """
    ids, other_ids = pairs["input_ids"].unbind(1)
    attention, other_attention = pairs["attention_mask"].unbind(1)
    differs = attention.bool() & ((ids != other_ids) | ~other_attention.bool())
    labels = pairs["labels"][:, 0].masked_fill(~differs, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": attention, "labels": labels, "differs": differs}


def check_pairs(rows: Batch, stream: str) -> None:
    """Refuse rows that are not two answers to one prompt.

    Raises:
        TemperError: naming the stream and what its rows are.
    """
    shape = tuple(rows["input_ids"].shape)
    if len(shape) != 3 or shape[1] != 2:
        raise TemperError(
            f"stream {stream!r}: its rows are shaped {shape}, not B x 2 x T; RepNoise needs pairs"
            " of a harmful answer and a refusal to the same prompt (temper.data.pair_rows makes"
            " them)"
        )
    prompts = torch.where(
        (rows["labels"] == IGNORE_INDEX) & rows["attention_mask"].bool(), rows["input_ids"], -1
    )
    if not torch.equal(prompts[:, 0], prompts[:, 1]):
        raise TemperError(
            f"stream {stream!r}: the two sequences of a row do not begin with the same prompt; pair"
            " answers to one prompt"
        )
