"""Log-probabilities of a model for the labelled tokens of rows: the input of every loss.

Shapes: `...` any leading dimensions (``B`` rows, or ``B x 2`` for rows of two sequences), `T` time,
`V` vocabulary, `D` width, `L` layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the labels of rows, with logits or hidden states if requested.

    Attributes:
        logps: ``... x (T - 1)``, nats; position t is the log-probability of token t + 1, 0 where
            masked.
        mask: ``... x (T - 1)``, bool: labelled positions.
        logits: ``... x (T - 1) x V``, aligned with ``logps``; None unless requested.
        hidden: Hidden states ``... x T x D``: the embeddings, then the output of every layer, the
            last one after the final norm (Hugging Face's order); None unless requested.
        attended: ``... x T``, bool: positions that are not padding; None without ``logits`` and
            ``hidden``.
        labels: ``... x (T - 1)``, token ids aligned with ``logits``, negative where masked; None
            without ``logits``.
    """

    logps: Tensor
    mask: Tensor
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    attended: Tensor | None = None
    labels: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """Log-probability of each sequence: ``l(y|x)``, shape ``...``, nats."""
        return (self.logps * self.mask).sum(-1)

    @property
    def counts(self) -> Tensor:
        """Labelled tokens of each sequence, shape ``...``."""
        return self.mask.sum(-1)

    @property
    def means(self) -> Tensor:
        """Mean log-probability ``lbar(y|x) = l(y|x) / |y|``, shape ``...``, nats per token.

        It is 0 for a sequence without labels.
        """
        return self.sums / self.counts.clamp(min=1)

    def __getitem__(self, index: Any) -> "Scores":
        """Select rows, or one sequence of every pair: ``scores[:, 0]``."""
        return self._map(lambda tensor: tensor[index])

    def detach(self) -> "Scores":
        """Return the same scores without gradient."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Scores":
        logits = None if self.logits is None else function(self.logits)
        hidden = None if self.hidden is None else tuple(map(function, self.hidden))
        attended = None if self.attended is None else function(self.attended)
        labels = None if self.labels is None else function(self.labels)
        return Scores(function(self.logps), function(self.mask), logits, hidden, attended, labels)


@dataclass(frozen=True)
class SequenceScores:
    """Sequence log-probabilities alone, as the disk cache stores them.

    They replace `Scores` in losses that use nothing but ``sums``.

    Attributes:
        sums: Log-probability of each sequence, shape ``...``, nats.
    """

    sums: Tensor

    def __getitem__(self, index: Any) -> "SequenceScores":
        """Select rows, or one sequence of every pair: ``scores[:, 0]``."""
        return SequenceScores(self.sums[index])

    def detach(self) -> "SequenceScores":
        """Return the same scores without gradient."""
        return SequenceScores(self.sums.detach())
