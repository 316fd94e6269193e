"""Preference optimisation over pairs of answers: DPO and its relatives."""

from typing import Any, get_args

from torch import Tensor

from lightning_modules.reference import PreferenceModule
from temper.data import Batch
from temper.errors import TemperError, did_you_mean
from temper.losses import MeanTerms, mean_of
from temper.losses.preference import PREFERENCE, PairLogps, PairSettings, Variant, pair_scores
from temper.models import NetworkSpec
from temper.plan.cost import Cost, Pass


class DPOModule(PreferenceModule):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and seven variants.

        loss = mean over pairs of -log sigma(beta * (c - r)),   c = l(y_c|x) - l_ref(y_c|x),   r
        likewise

    ``l``: sum of the log-probabilities of the answer's tokens. One forward pass scores chosen and
    rejected answers together. The equations of the other variants are in
    ``temper/losses/preference.py``; ``simpo`` and ``orpo`` have no reference model. Dropout is off,
    also where the network's own config has some.

    Args:
        network: Where the network comes from.
        variant: The loss.
        beta: Scale of the scores; the larger, the closer the policy stays to the reference.
        beta_chosen: Beta of the chosen answers' scores (``sigmoid``): ``-log sigma(beta_chosen * c
            - beta_rejected * r)`` in every pair, as in the code of the mechanistic study (Jain et
            al. 2024, arXiv 2407.10264), which has 0.1 and 0.01. None: beta.
        beta_rejected: Beta of the rejected answers' scores. None: beta.
        label_smoothing: Assumed share of pairs whose answers are swapped (``cdpo``, ``robust``).
        gamma: Margin by which the scores must differ, after beta (``simpo``).
        window: Divide sums of log-probabilities by this; 1 leaves them. The mechanistic study
            divides by the length of its windows.
        chosen_nll: Weight of ``-l(y_c|x) / |y_c|``, added to every pair's loss (Pang et al. 2024,
            arXiv 2404.19733, equation 2): a preference alone may be met by making both answers
            unlikely.
        kwargs: See `ReferenceModule`.

    Raises:
        TemperError: a setting that the variant does not read, or a number outside its range.
    """

    streams = ("pairs",)

    def __init__(
        self,
        network: NetworkSpec,
        variant: Variant = "sigmoid",
        beta: float = 0.1,
        beta_chosen: float | None = None,
        beta_rejected: float | None = None,
        label_smoothing: float = 0.0,
        gamma: float = 0.0,
        window: float = 1.0,
        chosen_nll: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if variant not in PREFERENCE:
            accepted = f"accepted: {', '.join(get_args(Variant))}"
            hint = did_you_mean(str(variant), get_args(Variant), accepted)
            raise TemperError(f"model.init_args.variant={variant}: no such loss; {hint}")
        super().__init__(network, **kwargs)
        self.preference = PREFERENCE[variant]
        self.variant = variant
        self.beta = beta
        self.beta_chosen = beta_chosen
        self.beta_rejected = beta_rejected
        self.window = window
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.chosen_nll = chosen_nll
        self._check_settings()
        self.read_reference("sums" if self.preference.reference else "nothing", ("pairs",))

    def _check_settings(self) -> None:
        """Refuse what the variant would ignore, and numbers that mean nothing."""
        for flag in ("beta", "beta_chosen", "beta_rejected", "window"):
            value = getattr(self, flag)
            if value is not None and not value > 0:
                raise TemperError(f"model.init_args.{flag}={value}: give a number > 0")
        unset = {
            "label_smoothing": "0",
            "gamma": "0",
            "beta_chosen": "null",
            "beta_rejected": "null",
        }
        for flag, nothing in unset.items():
            value = getattr(self, flag)
            if value and flag not in self.preference.reads:
                readers = " or ".join(
                    name for name, preference in PREFERENCE.items() if flag in preference.reads
                )
                raise TemperError(
                    f"model.init_args.{flag}={value}: variant={self.variant} does not read it; set"
                    f" it to {nothing}, or use {readers}"
                )
        # At 1/2 the labels say nothing: robust divides by 1 - 2e, and cdpo has no preference left.
        if not 0 <= self.label_smoothing < 0.5:
            raise TemperError(
                f"model.init_args.label_smoothing={self.label_smoothing}: give a share in [0, 0.5)"
            )
        for flag in ("gamma", "chosen_nll"):
            if not getattr(self, flag) >= 0:
                raise TemperError(
                    f"model.init_args.{flag}={getattr(self, flag)}: give a number >= 0"
                )
        if self.preference.per_token and self.window != 1:
            raise TemperError(
                f"model.init_args.window={self.window}: variant={self.variant} divides by each"
                " answer's own length already; set it to 1"
            )

    def cost(self) -> Cost:
        """Both answers of every pair, by the reference and by the policy."""
        pairs = Pass("pairs", sequences=2)
        return Cost((*self.reference_passes(pairs), pairs), copies=self.reference_copies())

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step; logs the loss, and the means of rewards (scores times beta), margins and
        accuracy.
        """
        loss, gradient = self.gradient(batch["pairs"], self.preference_terms)
        self.apply_gradient(gradient)
        self.log("loss/preference", loss, prog_bar=True)

    def preference_terms(self, rows: Batch) -> MeanTerms:
        """Mean over pairs of the preference loss."""
        pairs = self.pair_logps(rows)
        settings = self.pair_settings()
        chosen_N, rejected_N = pair_scores(self.preference, pairs)
        self._log_rewards(*settings.rewards(chosen_N.detach(), rejected_N.detach()))
        losses_N = self.preference.loss(chosen_N, rejected_N, settings)
        if self.chosen_nll:
            losses_N = losses_N - self.chosen_nll * pairs.chosen_N / pairs.chosen_counts_N.clamp(
                min=1
            )
        return mean_of(losses_N)

    def pair_logps(self, rows: Batch) -> PairLogps:
        """Sums of log-probabilities of policy and reference."""
        # The reference first: the policy's graph is not alive meanwhile.
        reference = self.reference_scores(rows, "pairs").sums if self.preference.reference else None
        scores = self.score(rows)
        sums = scores.sums
        counts = scores.counts
        if reference is None:
            return PairLogps(sums[:, 0], sums[:, 1], counts[:, 0], counts[:, 1])
        return PairLogps(
            sums[:, 0], sums[:, 1], counts[:, 0], counts[:, 1], reference[:, 0], reference[:, 1]
        )

    def pair_settings(self) -> PairSettings:
        """Betas over the window, since sums are only ever multiplied by them; and the rest."""
        chosen, rejected = (
            (self.beta if beta is None else beta) / self.window
            for beta in (self.beta_chosen, self.beta_rejected)
        )
        return PairSettings(
            chosen, None if rejected == chosen else rejected, self.label_smoothing, self.gamma
        )

    def _log_rewards(self, chosen_N: Tensor, rejected_N: Tensor) -> None:
        self.log_mean("preference/accuracy", (chosen_N > rejected_N).float())
        self.log_mean("preference/margin", chosen_N - rejected_N)
        self.log_mean("preference/chosen_reward", chosen_N)
        self.log_mean("preference/rejected_reward", rejected_N)
