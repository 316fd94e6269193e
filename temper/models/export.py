"""Export a network as a folder that plain transformers (or PEFT) loads, with a model card."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.models.end_tokens import end_tokens
from temper.models.folder import first_line
from temper.models.lora import check_base_name, is_adapted, save_adapter
from temper.models.merge import merged_copy
from temper.output_folder import staging_folder

WRITER = "temper export"  # in the marker of the folder
Dtype = Literal["float32", "bfloat16", "float16"]
Form = Literal["whole", "merged", "adapter"]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

# -- writing a folder


def export_network(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool,
    card: str | None = None,
    stop_ids: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    flag: str = "--folder",
) -> None:
    """Save weights (safetensors), config, tokenizer, generation config and card in a folder.

    An earlier export is replaced in one move (`temper.output_folder`). The network in training does
    not change. The base model's generation config is kept, its end tokens included. Nothing is
    checked: see `temper.models.run_export`.

    Args:
        network: A transformers model, or a PEFT model around one.
        tokenizer: Saved in the same folder, with its chat template.
        folder: Target; it never holds an incomplete export.
        merge: Merge LoRA weights into the base model, which is dequantized first if it is
            quantized; otherwise only the adapter of a PEFT model is saved.
        card: Text of README.md (`model_card`); None writes no README.md.
        stop_ids: Tokens that end an answer, beside those of the network.
        dtype: Precision of the saved weights, unless only an adapter is saved; None: their own.
        flag: Option that gave the folder, for errors.

    Raises:
        TemperError: only the adapter would be saved, and its base model is in no folder; or the
            target holds files that Temper did not write.
    """
    form: Form = "whole"
    if is_adapted(network):
        form = "merged" if merge else "adapter"
    if form == "adapter":
        check_base_name(network)
    with staging_folder(folder, flag, WRITER) as staging:
        write_export(network, tokenizer, staging, form, stop_ids, dtype)
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")


def write_export(
    network: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    form: Form,
    stop_ids: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> None:
    """Write all of an export but its card into an empty folder; arguments of `export_network`."""
    generation = _generation_config(network, tokenizer, stop_ids)
    if form == "adapter":
        save_adapter(network, folder)
        generation.save_pretrained(folder)
    else:
        saved: Any = merged_copy(network, dtype) if form == "merged" else _cast(network, dtype)
        before = saved.generation_config
        try:
            saved.generation_config = generation
            saved.save_pretrained(folder)
        finally:
            saved.generation_config = before
    tokenizer.save_pretrained(folder)


def check_savable(
    network: nn.Module, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None
) -> None:
    """Check, before training, that what an export writes beside the weights can be saved.

    Raises:
        TemperError: config, generation config, tokenizer or adapter config cannot be.
    """
    plain: Any = network.get_base_model() if is_adapted(network) else network  # type: ignore[operator]
    parts = {
        "config": plain.config.save_pretrained,
        "generation config": _generation_config(plain, tokenizer, stop_ids).save_pretrained,
        "tokenizer": tokenizer.save_pretrained,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, save in parts.items():
            try:
                save(folder)
            except (OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise TemperError(
                    f"HFExport: the {name} of this model cannot be saved, so its export would fail"
                    f" after training: {first_line(error)}; correct its files, or drop HFExport"
                ) from error


def _cast(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a precision: itself if it has that precision, otherwise a copy."""
    same = dtype is None or dtype == precision_of(network)
    return network if same else copy.deepcopy(network).to(dtype)


def precision_of(network: nn.Module) -> torch.dtype:
    """The lowest precision of a network's weights, adapters aside."""
    found = {
        weight.dtype
        for name, weight in network.named_parameters()
        if weight.is_floating_point() and "lora_" not in name
    }
    return min(found, key=lambda dtype: dtype.itemsize)


def _generation_config(
    network: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None
) -> Any:
    """The network's generation config, with the pad token of training and all end tokens."""
    config = copy.deepcopy(network.generation_config)
    config.pad_token_id = tokenizer.pad_token_id
    own = config.eos_token_id
    listed = [] if own is None else [own] if isinstance(own, int) else list(own)
    further = [token for token in end_tokens(network, stop_ids or ()) if token not in listed]
    if further:
        config.eos_token_id = [*listed, *further]
    if not config.do_sample:
        # Published configs have these next to do_sample=false, and transformers refuses to save
        # such a config once it has been changed.
        for name in SAMPLING:
            setattr(config, name, None)
    return config
