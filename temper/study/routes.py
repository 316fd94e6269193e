"""Through which folders an objective goes: most align, and are attacked; some act later."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """Where the models of an objective come from, as folders inside ``seed<n>/``.

    * A defence in the alignment stage has a ``config`` of its own.
    * One that edits weights starts from another objective's aligned model (``aligned_by``) and has
      ``edit``.
    * One in the user's fine-tuning starts from another's aligned model and has ``attack``.
    * One after it starts from another's attacked model and has ``repair``.

    Attributes:
        objective: Its key in the study.
        aligned_by: The objective whose alignment it uses; itself, unless the study says otherwise.
        edited: Whether an edit of that alignment is its own aligned model.
        attacked_as: The objective whose attacked models it uses.
        repaired: Whether it is measured after a repair.
        retrained: Whether that repair trains, and leaves a run card and an export.
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
        """Folders from the attack on; the last one holds the evaluation."""
        place = f"{attack}/p{float(ratio):g}"
        return [f"attack/{self.attacked_as}/{place}"] + (
            [f"repair/{self.objective}/{place}"] if self.repaired else []
        )
