"""Write a network as a folder that plain transformers (or PEFT) loads."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase


def export_network(network: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Save weights (safetensors), config and tokenizer; replaces the folder in one move.

    Args:
        network: A transformers model, or a PEFT model around one.
        tokenizer: Saved beside it.
        folder: Target; a half-written export is never seen under this name.
        merge: Merge LoRA weights into the base; otherwise a PEFT model is saved adapter-only.
    """
    with replacing(folder) as staging:
        _plain(network, merge).save_pretrained(staging)  # type: ignore[operator]
        tokenizer.save_pretrained(staging)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` if the body succeeds and goes away if it raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = staging.with_name(f"{staging.name}-old")  # moved aside, not removed: two renames, and no moment with half a folder
    try:
        yield staging
        staging.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(staging, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        for left_over in (staging, old) if folder.exists() else (staging,):
            shutil.rmtree(left_over, ignore_errors=True)


def _plain(network: nn.Module, merge: bool) -> nn.Module:
    from peft import PeftModel

    if merge and isinstance(network, PeftModel):
        import copy

        # Merged in a copy: training may go on with the adapter.
        merged: nn.Module = copy.deepcopy(network).merge_and_unload()
        return merged
    return network
