"""Reference models behind one protocol: adapter switched off, frozen copy, disk cache of sums.

A loss reads `Scores` of the reference (or `SequenceScores`, which a cache keeps) and does not know
which of the three it came from.
"""

import contextlib
import copy
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from temper.errors import TemperError
from temper.losses import Scores, SequenceScores
from temper.models.lora import disable_trained_adapter
from temper.models.score import Rows, score


class Reference(Protocol):
    """Anything that scores rows without gradient."""

    def score(
        self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False
    ) -> Scores | SequenceScores:
        """Scores of rows of a stream.

        Args:
            rows: As for `temper.models.score.score`, with ``ids`` where a cache is read.
            stream: Name of the stream that the rows belong to.
            logits: Logits are needed.
            hidden: Hidden states are needed.
        """
        ...


class AdapterOff:
    """The policy's own network with its new LoRA adapter switched off: no memory at all.

    Right while that adapter is the only difference between policy and reference. An adapter that
    was found and is kept frozen beside the new one stays on: training starts from it.

    Args:
        network: The policy, with a new adapter.
        fused: As the policy computes its log-probabilities: see `temper.models.score.score`.
    """

    def __init__(self, network: nn.Module, fused: bool = False) -> None:
        self.network, self.fused = network, fused

    @torch.no_grad()
    def score(self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False) -> Scores:
        """See `Reference`."""
        was_training = self.network.training
        self.network.eval()  # a reference has no dropout, whatever the policy has
        try:
            with disable_trained_adapter(self.network):
                return score(self.network, rows, logits, hidden, self.fused)
        finally:
            self.network.train(was_training)


class FrozenCopy:
    """A copy of the network as it was: one more set of weights in memory.

    Args:
        network: The policy, which is copied.
        fused: As the policy computes its log-probabilities: see `temper.models.score.score`.
    """

    def __init__(self, network: nn.Module, fused: bool = False) -> None:
        self.network, self.fused = copy.deepcopy(network).eval().requires_grad_(False), fused

    @torch.no_grad()
    def score(self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False) -> Scores:
        """See `Reference`."""
        return score(self.network, rows, logits, hidden, self.fused)


class CachedSums:
    """Sequence log-probabilities of a fixed pool of rows, looked up by the rows' ``ids``.

    Args:
        tables: For every stream, sums by row number (``n`` or ``n x 2``, nats).
    """

    def __init__(self, tables: dict[str, Tensor]) -> None:
        self.tables = tables

    def score(
        self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False
    ) -> SequenceScores:
        """See `Reference`; logits and hidden states are not kept."""
        if logits or hidden:
            raise ValueError("a cache of reference log-probabilities keeps sums only")
        table = self.tables[stream]
        if table.device != rows["ids"].device:
            table = self.tables[stream] = table.to(rows["ids"].device)
        return SequenceScores(table[rows["ids"]])


# MERGED from temper.models.reference: Reference log-probabilities on disk, used again by every run
# with the same model, rows and tokenizer.


NAMES = (
    "_name_or_path",
    "transformers_version",
)  # of a config that say where it came from, not what it does
BATCH = 32  # rows per forward pass while filling the cache, where nothing else is said


def reference_sums(
    network: nn.Module,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stream: str,
    batch_size: int | None = None,
    fused: bool = False,
    precision: str = "32-true",
) -> Tensor:
    """Sums of log-probabilities of every row of a pool, by row number, from disk or computed and
    stored.

    Args:
        network: The reference model; its mode is left as it was.
        source: A stream's source with a fixed pool: ``pool`` and ``fingerprint()``.
        tokenizer: Part of the key: its vocabulary and templates decide what the ids mean.
        folder: Folder of the cache.
        stream: Name of the stream, for errors.
        batch_size: Rows per forward pass; None takes `BATCH`.
        fused: Never hold the logits: see `temper.models.score.score`.
        precision: The Trainer's, part of the key; the caller provides the context it means.

    Returns:
        ``n`` or ``n x 2`` sums, nats, on the CPU.

    Raises:
        TemperError: the stream has no fixed pool of rows, or its rows are not numbered.
    """
    pool = getattr(source, "pool", None)
    if pool is None:
        raise TemperError(
            f"model.init_args.reference=cached: the stream {stream!r} makes rows as it goes; use"
            " reference=frozen"
        )
    shape = _shape(pool)
    key = cache_key(network, f"{source.fingerprint()} {shape} {precision}", tokenizer)
    path = folder / f"{key}.safetensors"
    sums = _load(path, shape[:-1])
    if sums is None:
        sums = _compute(network, pool, batch_size or BATCH, fused, stream)
        _store(path, sums)
    return sums


def cache_key(network: nn.Module, data_hash: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the weights, the rows, and the tokenizer with its chat template.

    An adapter whose second factor is still zero, as a new one's is, adds nothing to the network and
    is left out: its first factor is random, and every run would have a key of its own.
    """
    digest = hashlib.sha256(data_hash.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    state = network.state_dict()
    idle = {
        name.replace("lora_B", factor)
        for name, tensor in state.items()
        if "lora_B" in name and not tensor.any()
        for factor in ("lora_A", "lora_B")
    }
    digest.update(
        _settings(network, any("lora_B" in name and name not in idle for name in state)).encode()
    )
    for name, tensor in sorted(state.items()):
        if name not in idle:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:32]


def _settings(network: nn.Module, adapted: bool) -> str:
    """What decides a network's answers beside its weights: heads, rotations, epsilons, an adapter's
    scale, ...
    """
    config = {name: value for name, value in network.config.to_dict().items() if name not in NAMES}  # type: ignore[union-attr,operator]
    adapters = getattr(network, "peft_config", {}) if adapted else {}
    scales = {name: (c.r, c.lora_alpha, c.use_rslora, c.use_dora) for name, c in adapters.items()}
    return f"{sorted(config.items(), key=str)} {sorted(scales.items())}"


def _load(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The table in a file; None if there is no file, or one that is damaged (a full disk, a broken
    copy).
    """
    try:
        sums = load_file(path)["sums"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return sums if sums.shape == shape else None


def _store(path: Path, sums: Tensor) -> None:
    """Write a table under another name and rename it: no reader ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        save_file({"sums": sums}, part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _shape(pool: Any) -> tuple[int, ...]:
    """Rows, sequences in a row if there are several, tokens of the longest."""
    lengths = pool.lengths
    return (*lengths.shape, int(lengths.max()))


@torch.no_grad()
def _compute(network: nn.Module, pool: Any, batch_size: int, fused: bool, stream: str) -> Tensor:
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    try:
        parts = []
        for start in range(0, len(pool), batch_size):
            rows = pool[start : start + batch_size]
            if not torch.equal(rows["ids"].cpu(), torch.arange(start, start + len(rows["ids"]))):
                raise TemperError(
                    f"model.init_args.reference=cached: rows of the stream {stream!r} are not"
                    " numbered 0, 1, 2, ... in 'ids'"
                )
            batch = {
                name: rows[name].to(device) for name in ("input_ids", "attention_mask", "labels")
            }
            parts.append(score(network, batch, fused=fused).sums.cpu())
        return torch.cat(parts)
    finally:
        network.train(was_training)
