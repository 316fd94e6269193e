"""Every objective with the smallest data and settings that exercise it, for tests that run through
all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning_modules
from datamodules import (
    SyntheticAlignment,
    SyntheticAttack,
    SyntheticKTO,
    SyntheticPreference,
    SyntheticUnlearning,
)
from datamodules.base import StreamDataModule
from lightning_modules.base import ObjectiveModule

SMALL = {"preset": "tiny", "n_eval": 4, "seed": 1}
DATA: dict[str, Callable[..., StreamDataModule]] = {
    "alignment": partial(
        SyntheticAlignment,
        n_alignment=48,
        n_harmful=16,
        n_heldout=16,
        batch_size=8,
        harmful_batch_size=4,
        **SMALL,
    ),
    "preference": partial(SyntheticPreference, n_pairs=24, batch_size=8, **SMALL),
    "kto": partial(SyntheticKTO, n_rows=24, batch_size=8, **SMALL),
    "unlearning": partial(
        SyntheticUnlearning, n_forget=12, n_retain=12, batch_size=4, retain_batch_size=4, **SMALL
    ),
    "unlearning_pairs": partial(
        SyntheticUnlearning,
        n_forget=12,
        n_retain=12,
        batch_size=4,
        retain_batch_size=4,
        retain_substitutes=True,
        **SMALL,
    ),
    "attack": partial(
        SyntheticAttack,
        n_rows=20,
        harmful_ratio=0.1,
        batch_size=4,
        n_alignment=16,
        alignment_batch_size=4,
        n_safety=4,
        **SMALL,
    ),
}


@dataclass(frozen=True)
class Case:
    """An objective and what to expect of it.

    Attributes:
        name: Name of the class.
        settings: Its own arguments.
        data: Key of `DATA`.
        batch_statistic: It refuses micro-batches and several ranks.
        reads_logits: It refuses ``fused_loss``.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "alignment"
    batch_statistic: bool = False
    reads_logits: bool = False

    @property
    def kind(self) -> type[ObjectiveModule]:
        """The class."""
        return getattr(lightning_modules, self.name)

    def make_data(self) -> StreamDataModule:
        """A new datamodule."""
        return DATA[self.data]()

    def __str__(self) -> str:
        own = "-".join(str(value) for value in self.settings.values() if isinstance(value, str))
        return self.name.removesuffix("Module") + (f"-{own}" if own else "")


FORGET = ("ga", "bounded", "npo", "simnpo", "idk_nll", "idk_dpo", "wga", "satimp", "undial")
PREFERENCES = ("sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo")

CASES = [
    Case("SFTModule"),
    Case("BoosterModule", {"lam": 2.0, "alpha": 0.05}),
    Case("HeldBoosterModule", {"lam": 2.0, "alpha": 0.05, "refresh_every": 2}),
    Case("VaccineModule", {"rho": 0.5}),
    Case("TVaccineModule", {"rho": 0.5, "n_layers": 1, "importance_every": 2, "sample_every": 1}),
    Case("BoosterVaccineModule", {"lam": 2.0, "alpha": 0.05, "rho": 0.5}),
    Case("RepNoiseModule", {"alpha": 0.1, "beta": 0.1}, batch_statistic=True),
    Case("TARModule", {"inner_steps": 2, "tamper_every": 1, "inner_lr": 1e-3}, reads_logits=True),
    Case("LisaModule", {"alignment_steps": 1, "user_steps": 2, "rho": 0.1}, "attack"),
    Case("SafeInstructModule", {"lam": 0.5}, "attack"),
    *(
        Case(
            "DPOModule",
            {"variant": name} | ({"label_smoothing": 0.1} if name in ("cdpo", "robust") else {}),
            "preference",
        )
        for name in PREFERENCES
    ),
    Case("KTOModule", {}, "kto"),
    *(
        Case("UnlearningModule", {"forget": name}, "unlearning", reads_logits=name == "undial")
        for name in FORGET
    ),
    *(
        Case(
            "UnlearningModule",
            {"forget": "npo", "retain": name},
            "unlearning",
            reads_logits=name.startswith("kl"),
        )
        for name in ("kl", "kl_all", "embedding")
    ),
    Case("UnlearningModule", {"forget": "bounded", "retain": "bounded"}, "unlearning_pairs"),
    Case("RMUModule", {"layer": 0}, "unlearning"),
    Case("RMUModule", {"layer": 0, "tokens": "answer", "average": "rows"}, "unlearning"),
]

# Those that move weights or hidden states between passes: the ones that a strategy can get wrong in
# ways of its own.
PERTURBING = [
    case
    for case in CASES
    if case.name
    in (
        "BoosterModule",
        "HeldBoosterModule",
        "VaccineModule",
        "TVaccineModule",
        "BoosterVaccineModule",
        "TARModule",
    )
]
