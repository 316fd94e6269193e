"""Unlearning: forget some answers, keep the others."""

from typing import Any

from lightning_modules.forget_retain import ForgetRetainModule, pick
from temper.data import Batch
from temper.errors import TemperError
from temper.losses import MeanTerms, Scores, SequenceScores
from temper.losses.unlearning import FORGET, RETAIN, ForgetName, Options, RetainName, Term
from temper.models import NetworkSpec


class UnlearningModule(ForgetRetainModule):
    """``L = gamma * L_forget + alpha * L_retain`` with losses from `temper.losses.unlearning`.

    Forget rows hold the answer to forget and, for ``bounded``, ``idk_nll`` and ``idk_dpo``, a
    substitute for it. The reference is the policy as training found it. Two forward-backward passes
    per step; kl, embedding, npo, idk_dpo and undial add a forward pass of the reference each.

    Args:
        network: Where the network comes from.
        forget: Forget loss: ``ga``, ``bounded``, ``npo``, ``simnpo``, ``idk_nll``, ``idk_dpo``,
            ``wga``, ``satimp`` or ``undial``. GradDiff is ``ga`` with the retain loss ``nll``.
        retain: Retain loss: ``none``, ``nll``, ``bounded`` (of rows with substitutes: learn the
            answer, weakly unlearn the substitute), ``kl`` (``KL(reference || policy)`` on answer
            tokens), ``kl_all`` (the same on all tokens, prompts included) or ``embedding`` (squared
            distance of hidden states from the reference's).
        gamma: Weight of the forget loss.
        alpha: Weight of the retain loss; not read with ``retain=none``.
        ascent: Weight of the ascent: bounded, of the forget and of the retain loss (0.1). None is
            the loss's own default, in brackets.
        beta: Steepness of npo (0.1), simnpo (4.5) and idk_dpo (0.1), exponent of wga (1) and satimp
            (5), what undial takes off the label's logit (10).
        beta2: Second exponent: satimp (1).
        delta: Margin, nats per token: simnpo (0).
        kwargs: See `ForgetRetainModule`.
    """

    def __init__(
        self,
        network: NetworkSpec,
        forget: ForgetName = "npo",
        retain: RetainName = "nll",
        gamma: float = 1.0,
        alpha: float = 1.0,
        ascent: float | None = None,
        beta: float | None = None,
        beta2: float | None = None,
        delta: float | None = None,
        **kwargs: Any,
    ) -> None:
        forget_loss: Term = _named("forget", forget, FORGET)
        # Of weight 0 it is not computed, and needs nothing.
        retain_loss: Term | None = _named("retain", retain, RETAIN) if alpha else None
        super().__init__(network, gamma, alpha if retain_loss else 0.0, **kwargs)
        self.forget_loss = forget_loss
        self.retain_loss = retain_loss
        given = {"ascent": ascent, "beta": beta, "beta2": beta2, "delta": delta}
        kept = retain_loss.options if retain_loss else {}
        self.options = _options(
            f"forget={forget} with retain={retain}" if kept else f"forget={forget}",
            {**kept, **forget_loss.options},
            {name: value for name, value in given.items() if value is not None},
        )
        self.retain_sequences = retain_loss.sequences if retain_loss else "answer"
        for flag, term in (("forget", self.forget_loss), ("retain", self.retain_loss)):
            if self.fused_loss and term is not None and term.logits:
                name = {"forget": forget, "retain": retain}[flag]
                raise TemperError(
                    f"model.init_args.fused_loss=true: {flag}={name} reads the logits themselves;"
                    " set it to false"
                )
        losses = {"forget": self.forget_loss, "retain": self.retain_loss}
        needs = {
            stream: term.reference
            for stream, term in losses.items()
            if term is not None and term.reference != "nothing"
        }
        if "everything" in needs.values():
            self.read_reference("everything", tuple(needs))
        else:
            self.read_reference("sums" if needs else "nothing", tuple(needs))

    def forget_sequences(self) -> int:
        """Both where the loss compares answer and substitute."""
        return 2 if self.forget_loss.sequences == "both" else 1

    def forget_rows(self, rows: Batch) -> Batch:
        """See `pick`."""
        return pick(rows, self.forget_loss.sequences, "forget")

    def forget_terms(self, rows: Batch) -> MeanTerms:
        """The chosen forget loss."""
        reference = self._reference_of(self.forget_loss, rows, "forget")
        policy = self.score(rows, self.forget_loss.logits, self.forget_loss.hidden)
        return self.forget_loss.loss(policy, reference, self.options)

    def retain_terms(self, rows: Batch) -> MeanTerms:
        """The chosen retain loss."""
        assert self.retain_loss is not None
        reference = self._reference_of(self.retain_loss, rows, "retain")
        policy = self.score(rows, self.retain_loss.logits, self.retain_loss.hidden)
        self.watch(policy)
        return self.retain_loss.loss(policy, reference, self.options)

    def _reference_of(self, term: Term, rows: Batch, stream: str) -> Scores | SequenceScores | None:
        """The reference scores that a loss reads; made before the policy's, whose graph need not be
        alive meanwhile.
        """
        if term.reference == "nothing":
            return None
        reference = self.reference_scores(rows, stream, term.logits, term.hidden)
        if (
            isinstance(reference, SequenceScores)
            and reference.sums.dim() > rows["labels"].dim() - 1
        ):
            return reference[:, 0]  # a cache holds both sequences of a row
        return reference


def _named(flag: str, name: str, table: dict[Any, Any]) -> Any:
    if name not in table:
        raise TemperError(f"model.init_args.{flag}={name}: choose one of {', '.join(table)}")
    return table[name]


def _options(losses: str, defaults: Options, given: dict[str, float]) -> dict[str, float]:
    """The options of the losses: their defaults, replaced by given values."""
    reads = ", ".join(defaults) or "none of them"
    for name, value in given.items():
        if name not in defaults:
            raise TemperError(
                f"model.init_args.{name}={value}: {losses} does not read it (it reads"
                f" {reads}); set {name} to null"
            )
        if value < 0 and name != "delta":
            raise TemperError(f"model.init_args.{name}={value}: give a number >= 0")
        if value == 0 and name == "beta":
            raise TemperError("model.init_args.beta=0: give a number > 0")
    return {**defaults, **given}
