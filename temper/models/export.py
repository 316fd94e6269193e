"""Write a network as a folder that plain transformers (or PEFT) loads."""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from temper.models.adapters import merge_cosine, merged_copy, save_adapter
from temper.models.card import model_card
from temper.models.lora import is_adapted
from temper.models.quantise import is_quantised
from temper.run_folder import replace_folder

Dtype = Literal["float32", "bfloat16", "float16"]
FAITHFUL = 0.999  # least cosine of what merging leaves of an adapter that passes without a word
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def export_network(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool,
    card: str | Callable[[nn.Module], str] | None = None,
    stop_ids: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save weights (safetensors), config, tokenizer, generation config and card; replaces the folder in one move.

    The network in training is left as it is. Sampling settings that came with the base stay as they were.

    Args:
        network: A transformers model, or a PEFT model around one.
        tokenizer: Saved beside it, with its chat template.
        folder: Target; a half-written export is never seen under this name.
        merge: Merge LoRA weights into the base, which is made dense if it is held in few bits; otherwise a PEFT model is
            saved adapter-only.
        card: What stands in README.md (`temper.models.card.model_card`), or makes it of the plain network that is written; None writes
            none.
        stop_ids: Tokens that end an answer; None: as the network's generation config has it.
        dtype: Precision of a plain network that is written; None: its own.

    Raises:
        TemperError: adapter-only, and the base of the adapter is in no folder.
    """
    alone = not merge and is_adapted(network)
    with replacing(folder) as staging:
        if alone:
            save_adapter(network, staging)
            _generation_config(network, tokenizer, stop_ids).save_pretrained(staging)
        else:
            exported: Any = merged_copy(network, dtype) if is_adapted(network) else _in(network, dtype)
            before = exported.generation_config
            try:
                exported.generation_config = _generation_config(network, tokenizer, stop_ids)
                exported.save_pretrained(staging)
            finally:
                exported.generation_config = before
        tokenizer.save_pretrained(staging)
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's, which names folders of this machine
        if card is not None:
            text = card if isinstance(card, str) else card(network if alone else exported)
            (staging / "README.md").write_text(text, encoding="utf-8")


def export_module(
    module: Any,
    data: Any,
    folder: Path,
    merge: bool,
    run: Path | None = None,
    step: int = 0,
    network: nn.Module | None = None,
    dtype: str | None = None,
) -> None:
    """Export the network of an objective, with the tokenizer of its data and a model card.

    Args:
        module: Has ``network``; its ``network_spec`` says where that came from, and without it there is no card.
        data: Has ``tokenizer``; its ``stop_ids``, if any, end an answer.
        folder: Target.
        merge: As for `export_network`.
        run: Run folder that the card is written from; None: nothing was trained.
        step: Optimizer steps behind the weights.
        network: What is exported in place of ``module.network``, whose weights may be cut over ranks.
        dtype: Precision of a plain network that is written, by torch's name; None: its own.
    """
    spec: Any = getattr(module, "network_spec", None)
    network = module.network if network is None else network
    form = "whole" if not is_adapted(network) else "merged" if merge else "adapter"

    def card(written: nn.Module) -> str:
        return model_card(spec, form, run, step, _rounding(network, written) if form == "merged" else "")

    stop_ids, to = getattr(data, "stop_ids", None), None if dtype is None else getattr(torch, dtype)
    export_network(network, data.tokenizer, folder, merge, None if spec is None else card, stop_ids, to)


def _in(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a precision; a copy, if it is in another."""
    same = dtype is None or all(parameter.dtype == dtype for parameter in network.parameters() if parameter.is_floating_point())
    return network if same else copy.deepcopy(network).to(dtype)


def _rounding(network: nn.Module, merged: nn.Module) -> str:
    """What merging lost, in words for the card; warned about if it is much."""
    if is_quantised(network):
        return "The base was held in few bits; it was made dense first."
    cosine, precision = merge_cosine(network, merged), str(next(merged.parameters()).dtype).removeprefix("torch.")
    if cosine >= FAITHFUL:
        return ""
    warnings.warn(
        f"merging rounded to {precision}: cosine {cosine:.3f} between the change that training made and what is left of it. Export with "
        "dtype=float32 (twice the size), or the adapter alone (merge=false), to keep it as it was trained",
        stacklevel=2,
    )
    return f"The sum was rounded to {precision}: the cosine between the change that training made and what is left of it is {cosine:.3f}."


def _generation_config(network: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None) -> Any:
    """How the network decodes, with the padding and the end tokens that answers were trained and generated with."""
    config = copy.deepcopy(network.generation_config)
    config.pad_token_id = tokenizer.pad_token_id
    if stop_ids:
        config.eos_token_id = list(stop_ids)
    if not config.do_sample:
        # Published configs hold these beside do_sample=false, and transformers refuses to save such a config once it was changed.
        for name in SAMPLING:
            setattr(config, name, None)
    return config


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` if the body succeeds and goes away if it raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = staging.with_name(f"{staging.name}-old")
    try:
        yield staging
        staging.chmod(0o755)
        for file in staging.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files that nobody else can read
        replace_folder(folder, staging, old)
    finally:
        for left_over in (staging, old) if folder.exists() else (staging,):
            shutil.rmtree(left_over, ignore_errors=True)
