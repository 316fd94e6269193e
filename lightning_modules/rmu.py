"""RMU: steer the hidden states of forget rows to a fixed point."""

import re
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.forget_retain import ForgetRetainModule, pick
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms, Scores
from temper.losses.representation import Average, hidden_distance, steering
from temper.models import NetworkSpec
from temper.plan.cost import Cost

# Weights of the MLP's output: Llama's and most others' name, GPT-2's.
DOWN_PROJECTION = r"\.(?:layers|h)\.{layer}\.mlp\.(?:down_proj|c_proj)\.weight$"


class RMUModule(ForgetRetainModule):
    """RMU (Li et al. 2024, arXiv 2403.03218): ``mean ||h_l - c u||^2`` on forget rows
    ``+ alpha mean ||h_l - h_ref_l||^2`` on retain rows.

    h_l is the output of decoder layer l; u is a fixed vector with entries drawn uniformly from
    [0, 1) and unit norm; the reference is the policy before training. Means of squared L2 norms
    over every position that is not padding, prompts included, as in the paper. The official code
    counts padding too, open-unlearning's averages over the answer tokens of each row and then over
    rows (``tokens=answer``, ``average=rows``), and both divide by the width, a constant that AdamW
    does not see but `max_grad_norm` does.

    Args:
        network: Where the network comes from.
        layer: Decoder layer l, from 0 (paper: 7). The last one's output is read after the final
            norm.
        steering_coefficient: c, the length of the point that forget rows are steered to. It should
            exceed the norm of the hidden states there.
        alpha: Weight of the retain loss. The paper's c and alpha depend on the model.
        tokens: Positions that count: ``all`` that are not padding, or those of the ``answer``.
        average: Mean over ``positions``, or over the positions of each row and then over ``rows``.
        seed: Seed of u.
        train_layers: Train the MLP down projections of these decoder layers alone, as the official
            code does with l - 2, l - 1 and l; None trains everything that is trainable, adapters
            included.
        kwargs: See `ForgetRetainModule`.
    """

    target: Tensor  # c u

    def __init__(
        self,
        network: NetworkSpec,
        layer: int = 7,
        steering_coefficient: float = 2.0,
        alpha: float = 1.0,
        tokens: Literal["all", "answer"] = "all",
        average: Literal["positions", "rows"] = "positions",
        seed: int = 0,
        train_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, alpha=alpha, **kwargs)
        if not steering_coefficient > 0:
            raise TemperError(
                f"model.init_args.steering_coefficient={steering_coefficient}: give a number > 0"
            )
        if network.lora is not None and train_layers is not None:
            raise TemperError(
                f"model.init_args.train_layers={train_layers}: with network.lora adapters are"
                " trained, not these weights; set one of the two to null"
            )
        for flag, name, known in (
            ("tokens", tokens, ("all", "answer")),
            ("average", average, ("positions", "rows")),
        ):
            if name not in known:
                raise TemperError(f"model.init_args.{flag}={name}: give one of {', '.join(known)}")
        self.average = Average(answers=tokens == "answer", by_row=average == "rows")
        self.layer = layer
        self.steering_coefficient = steering_coefficient
        self.seed = seed
        self.train_layers = train_layers
        # Hidden states, for the retain loss alone.
        self.read_reference("everything" if alpha else "nothing", ("retain",))

    def cost(self) -> Cost:
        """As for every such objective; with ``train_layers`` their MLP down projections learn."""
        cost = super().cost()
        if self.train_layers is None:
            return cost
        patterns = [DOWN_PROJECTION.replace("{layer}", str(layer)) for layer in self.train_layers]
        return replace(cost, trains="|".join(patterns))

    def configure_model(self) -> None:
        """Build the network, draw u, and freeze what is not to be trained.

        Raises:
            TemperError: the network has no such layer.
        """
        super().configure_model()
        config = self.policy.config
        for flag, layers in (("layer", [self.layer]), ("train_layers", self.train_layers or [])):
            if bad := [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]:
                raise TemperError(
                    f"model.init_args.{flag}={bad[0]}: the network has the decoder layers 0 to"
                    f" {config.num_hidden_layers - 1}"
                )
        if self.train_layers is not None:
            self._train_only(self.train_layers)
        u = torch.rand(
            config.hidden_size, generator=torch.Generator().manual_seed(self.seed), device="cpu"
        )
        self.register_buffer("target", self.steering_coefficient * u / u.norm(), persistent=False)

    def _train_only(self, layers: list[int]) -> None:
        if any("lora_" in name for name, _ in self.policy.named_parameters()):
            raise TemperError(
                f"model.init_args.train_layers={layers}: the network holds an adapter, which would"
                " be frozen and its base trained; set network.adapter=merge, or train_layers=null"
            )
        patterns = [DOWN_PROJECTION.replace("{layer}", str(layer)) for layer in layers]
        chosen = [
            name
            for name, _ in self.policy.named_parameters()
            if any(re.search(pattern, name) for pattern in patterns)
        ]
        if len(chosen) != len(set(layers)):
            raise TemperError(
                f"model.init_args.train_layers={layers}: found {len(chosen)} MLP down projections"
                f" in {type(self.policy).__name__}; set it to null to train everything"
            )
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(name in chosen)

    def forget_rows(self, rows: Batch) -> Batch:
        """The answers to forget; substitutes are not read."""
        return pick(rows, "answer", "forget")

    def forget_terms(self, rows: Batch) -> MeanTerms:
        """``mean ||h_l - c u||^2``."""
        return steering(self.score(rows, hidden=True), self.target, self.layer + 1, self.average)

    def retain_terms(self, rows: Batch) -> MeanTerms:
        """``mean ||h_l - h_ref_l||^2``."""
        # First: the policy's graph is not alive meanwhile.
        reference = self.reference_scores(rows, "retain", hidden=True)
        policy = self.score(rows, hidden=True)
        self.watch(policy)
        assert isinstance(reference, Scores), "sums hold no hidden states"
        return hidden_distance(policy, reference, self.layer + 1, self.average)
