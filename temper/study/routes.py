"""Through which folders an objective goes: most align, and are attacked; some act earlier or later.

* A defence in the alignment stage has a ``config`` of its own.
* One that edits weights starts from another objective's aligned model (``aligned_by``) and has ``edit``.
* One in the user's fine-tuning stage starts from another's aligned model and has ``attack``.
* One after it starts from another's attacked model and has ``repair``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Route:
    """Where the models of an objective come from, as folders inside ``seed<n>/``.

    Attributes:
        objective: Its key in the study.
        aligned_by: The objective whose alignment it uses; itself, unless the study says otherwise.
        edited: Whether an edit of that alignment is its own aligned model.
        attacked_as: The objective whose attacked models it uses.
        repaired: Whether its figures are those after a repair.
        retrained: Whether that repair trains, and leaves a run card.
    """

    objective: str
    aligned_by: str
    edited: bool
    attacked_as: str
    repaired: bool
    retrained: bool

    @property
    def aligned(self) -> list[str]:
        """Folders that its aligned model was made in; the last one holds it."""
        return [f"align/{self.aligned_by}"] + ([f"align/{self.objective}"] if self.edited else [])

    def attacked(self, attack: str, ratio: float | str) -> list[str]:
        """Folders from the attack on; the last one holds the figures."""
        place = f"{attack}/p{float(ratio):g}"
        return [f"attack/{self.attacked_as}/{place}"] + ([f"repair/{self.objective}/{place}"] if self.repaired else [])


def route(objectives: Mapping[str, Any], objective: str) -> Route:
    """The route of an objective of a study."""
    part = objectives[objective] or {}
    aligned_by = part.get("aligned_by", objective)
    repair = part.get("repair")
    retrained = repair is not None and repair.get("verb", "fit") == "fit"
    own_attack = aligned_by == objective or "attack" in part or "edit" in part
    return Route(objective, aligned_by, "edit" in part, objective if own_attack else aligned_by, repair is not None, retrained)
