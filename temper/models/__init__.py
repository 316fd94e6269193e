"""Networks: built from a shape, or loaded from a Hugging Face folder, with or without LoRA."""

from temper.models.export import export_network
from temper.models.folder import LoRASpec, NetworkSpec, ShapeSpec
from temper.models.load import build_network
from temper.models.reference import AdapterOff, CachedSums, FrozenCopy, Reference
from temper.models.score import score

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
