"""Networks: built from a shape, or loaded from a Hugging Face folder, with or without LoRA."""

from temper.models.build import build_network
from temper.models.export import export_network
from temper.models.reference import AdapterOff, CachedSums, FrozenCopy, Reference
from temper.models.score import score
from temper.models.spec import LoRASpec, NetworkSpec, ShapeSpec

__all__ = [
    "AdapterOff",
    "CachedSums",
    "FrozenCopy",
    "LoRASpec",
    "NetworkSpec",
    "Reference",
    "ShapeSpec",
    "build_network",
    "export_network",
    "score",
]
