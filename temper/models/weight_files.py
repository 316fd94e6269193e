"""The weights of a model folder: safe to read before they are loaded, complete once they are.

Only safetensors are read: a pickle can run code. A network whose files lack a weight would be
loaded with random numbers in its place, so that is refused, as are weights that it has no use for:
they are a sign that config.json is of another model.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import nn

from temper.errors import TemperError
from temper.models.folder import FLAG, NetworkSpec, is_adapter, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Stored values that say nothing that the config does not, or that belong to no causal LM: buffers
# of older transformers, and the value head of TRL.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\battn\.(masked_)?bias$|position_ids$|^v_head\.")
AGAIN = "download or export the model again"

# -- before loading


def check_folder(folder: Path, spec: NetworkSpec) -> None:
    """Check that a folder holds a network or an adapter, and that it is safe to read.

    Raises:
        TemperError: no config; weights only as pickles, which can run code when they are read; a
            weight index that names files outside the folder, other files than safetensors, or
            tensors that are not in its files.
    """
    where = f"{FLAG}.path={spec.path}"
    if not (folder / "config.json").exists() and not is_adapter(folder):
        raise TemperError(
            f"{where}: neither config.json nor adapter_config.json in it; give a run's export/"
            " folder"
        )
    for index in folder.glob("*.index.json"):
        _check_index_names(index, where)
    name = ADAPTER_WEIGHTS if is_adapter(folder) else MODEL_WEIGHTS
    # The weights of an adapter cannot be sharded: PEFT ignores an index and reads the pickle.
    sharded = not is_adapter(folder) and (folder / f"{name}.index.json").exists()
    if not (folder / name).exists() and not sharded:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise TemperError(
                f"{where}: {pickles[0]} is a pickle, and reading one can run any code; no {name} in"
                " it. Where you trust it, load it with transformers (or peft) and save it again:"
                " save_pretrained writes safetensors"
            )
        raise TemperError(f"{where}: no {name} in it; save the model again (save_pretrained)")
    if not is_adapter(folder):
        weight_files(folder, where)
        _check_other_weights(folder, where)


def check_base(base: Path, spec: NetworkSpec) -> None:
    """`check_folder` for the base model of the adapter in ``spec.path``.

    Raises:
        TemperError: as `check_folder`; or the base model is itself an adapter.
    """
    if is_adapter(base):
        raise TemperError(
            f"{FLAG}.path={spec.path}: its base model {base} is itself an adapter; merge that one"
            " first (temper export --model.network.path), and name the merged model in"
            " adapter_config.json"
        )
    check_folder(base, replace(spec, path=str(base)))


def weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files that transformers reads the weights of a network from.

    Args:
        folder: Folder of a network, not of an adapter.
        where: Flag and folder, for errors.

    Returns:
        One file or all shards; none if there are no safetensors.

    Raises:
        TemperError: the index names other files than safetensors, or tensors that are not in its
            files; or there are two sets of weights.
    """
    whole = folder / MODEL_WEIGHTS
    index = folder / f"{MODEL_WEIGHTS}.index.json"
    if not index.exists():
        return [whole] if whole.exists() else []
    _check_index_names(index, where)
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise TemperError(f"{where}: {index.name} names no weights (weight_map); {AGAIN}")
    names = sorted(set(shards.values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise TemperError(
                f"{where}: {index.name} names {name}, and only safetensors are read: any other file"
                " can run code; do not use this model, or save it again (save_pretrained) where"
                " you trust it"
            )
    if whole.exists() and names != [MODEL_WEIGHTS]:
        raise TemperError(
            f"{where}: two sets of weights, {MODEL_WEIGHTS} and the files of {index.name}; delete"
            " one"
        )
    _check_shards(folder, shards, where)
    return [folder / name for name in names]


def _check_index_names(index: Path, where: str) -> None:
    """Check that the index of sharded weights names files inside the folder only."""
    shards = read_json(index).get("weight_map", {})
    for name in shards.values() if isinstance(shards, dict) else [shards]:
        parts = PurePosixPath(str(name)).parts
        if (
            not isinstance(name, str)
            or not parts
            or ".." in parts
            or name.startswith("/")
            or "\\" in name
            or ":" in name
        ):
            raise TemperError(
                f"{where}: {index.name} names {name!r}, which is not inside the folder; do not use"
                " this model"
            )


def _check_shards(folder: Path, shards: Mapping[str, str], where: str) -> None:
    """Check that every shard is there, and that it holds the tensors that the index says."""
    for file in sorted(set(shards.values())):
        if not (folder / file).is_file():
            raise TemperError(f"{where}: its weights are in several files, and {file} is missing")
        named = {name for name, holder in shards.items() if holder == file}
        if lacking := sorted(named - set(read_header(folder / file, where))):
            raise TemperError(
                f"{where}: {file} lacks {_count(lacking)} that the index says it holds; {AGAIN}"
            )


def _check_other_weights(folder: Path, where: str) -> None:
    """Check that there are no other weights that transformers would read instead: files that
    config.json names, or a distributed checkpoint.
    """
    for file in folder.glob("shard-*-model-*.safetensors"):
        raise TemperError(
            f"{where}: {file.name} is of a distributed checkpoint, which is not read; load it with"
            " transformers and save it again (save_pretrained)"
        )
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if named is not None:
        raise TemperError(
            f"{where}: its config.json names a file of weights (transformers_weights={named!r});"
            f" remove that line, so that {MODEL_WEIGHTS} is read"
        )


class TensorInfo(NamedTuple):
    """Dtype (by its safetensors name) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path, where: str) -> dict[str, TensorInfo]:
    """Dtype and shape of every tensor in a safetensors file by name, in the order of their bytes.

    Raises:
        TemperError: the file is no safetensors file, or a damaged one.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("it ends in its header")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        ordered = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        return {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in ordered}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TemperError(
            f"{where}: {path.name} is no safetensors file, or a damaged one ({error}); {AGAIN}"
        ) from None


# -- once loaded


@contextmanager
def without_report() -> Iterator[None]:
    """Drop transformers' table of missing and unexpected weights inside a ``with`` block:
    `check_loaded` gives the reason in one line.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_loaded(network: nn.Module, info: Mapping[str, Any], where: str) -> None:
    """Check that a network got all of its weights from its files, and that they are numbers.

    Args:
        network: The network that ``from_pretrained`` returned.
        info: What it returned beside it (``output_loading_info=True``). Weights that are tied to
            others, and those that the architecture declares optional, are not in it.
        where: Flag and folder, for errors.

    Raises:
        TemperError: weights are missing, left over, of another shape, or not finite.
    """
    kind = type(network).__name__
    if missing := sorted(info["missing_keys"]):
        raise TemperError(
            f"{where}: its files lack {_count(missing)} of {kind} as config.json describes it, and"
            f" random numbers would take their place; {AGAIN}, or correct config.json"
        )
    if left_over := sorted(name for name in info["unexpected_keys"] if not HARMLESS.search(name)):
        raise TemperError(
            f"{where}: its files hold {_count(left_over)} that {kind}, as config.json describes it,"
            f" does not have and would lose; {AGAIN}, or correct config.json"
        )
    if other := sorted(entry[0] for entry in info["mismatched_keys"]):
        raise TemperError(f"{where}: {_count(other)} of another shape than config.json says")
    check_finite(network.named_parameters(), where)


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Check that weights hold no NaN and no infinity; they are read once, without a copy.

    Raises:
        TemperError: names the first that does.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            ends = torch.aminmax(tensor.detach())
            if not (ends.min.isfinite() and ends.max.isfinite()):
                raise TemperError(
                    f"{where}: the weight {name} holds NaN or infinity; give a model whose training"
                    " did not diverge"
                )


def check_tokens(tokenizer: Any, n_embeddings: int, where: str) -> None:
    """Check that a network has an embedding for every token that its text can hold.

    Special tokens beyond the embeddings are allowed where nothing writes them: they have no role,
    and are not in the chat template (Gemma 3 has an image token without an embedding).

    Args:
        tokenizer: The tokenizer.
        n_embeddings: Number of token embeddings of the network.
        where: Flag and folder, for errors.

    Raises:
        TemperError: names the first token without an embedding.
    """
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= n_embeddings}
    if not beyond:
        return
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {
        getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk", "sep")
    }
    template = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    for i, token in sorted(beyond.items()):
        if i not in special or i in roles or token in template:
            raise TemperError(
                f"{where}: the tokenizer has {len(tokenizer)} tokens and the network"
                f" {n_embeddings} embeddings: {token!r} has the id {i}; use the tokenizer that was"
                " saved with the network, or resize the embeddings (resize_token_embeddings) and"
                " save both"
            )


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({names[0]}, ...)"
