"""SafeInstruct: the defender's alignment rows beside the user's."""

from typing import Any, ClassVar

from lightning_modules.base import ObjectiveModule
from temper.data import Batch
from temper.errors import TemperError
from temper.models import NetworkSpec


class SafeInstructModule(ObjectiveModule):
    """``u(w) + lam * f(w)``: safety rows in the user's fine-tuning (Bianchi et al. 2024, arXiv 2309.07875; Qi et al. 2023, 2310.03693).

    u and f are the mean NLLs of the streams ``user`` and ``alignment``, each over its own tokens, so
    ``lam`` does not change with the batch sizes. Two passes per step, one gradient all-reduce. The
    papers mix rows instead: `SFTModule` on `SyntheticAttack` with ``n_safety`` is that.

    Args:
        network: Where the network comes from.
        lam: Weight of the alignment loss; 0 is SFT on the user's rows.
        kwargs: See `ObjectiveModule`.
    """

    streams: ClassVar = ("user", "alignment")

    def __init__(self, network: NetworkSpec, lam: float = 1.0, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        if not lam >= 0:
            raise TemperError(f"model.init_args.lam={lam}: give a number >= 0 (0 is SFT on the user's rows)")
        self.lam = lam

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """One step on both streams; logs both losses."""
        (user, alignment), gradient = self.weighted_gradient((1.0, batch["user"], None), (self.lam, batch["alignment"], None))
        self.apply_gradient(gradient)
        self.log("loss/user", user, prog_bar=True)
        self.log("loss/alignment", alignment)
