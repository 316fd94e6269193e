"""Reference models: the policy without its adapter, a frozen copy, or log-probabilities on disk.

All three have one protocol, `Reference`. A loss gets `Scores` of the reference model (or
`SequenceScores` from the disk cache) and does not depend on their source.
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

# -- the three kinds of reference


class Reference(Protocol):
    """A model that scores rows without gradient."""

    def score(
        self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False
    ) -> Scores | SequenceScores:
        """Score rows of a stream.

        Args:
            rows: As for `temper.models.score.score`; with ``ids``, their row numbers, if the
                reference is cached.
            stream: Name of the stream that the rows belong to.
            logits: Return the logits too.
            hidden: Return all hidden states too.
        """
        ...


class AdapterOff:
    """The policy with its trained LoRA adapter switched off; takes no extra memory.

    Correct while that adapter is the only difference between policy and reference. A frozen adapter
    beside the trained one stays on, because training starts with it.

    Args:
        network: The policy, with a trained adapter.
        fused: Compute log-probabilities as the policy does: see `temper.models.score.score`.
    """

    def __init__(self, network: nn.Module, fused: bool = False) -> None:
        self.network = network
        self.fused = fused

    @torch.no_grad()
    def score(self, rows: Rows, stream: str, logits: bool = False, hidden: bool = False) -> Scores:
        """See `Reference`."""
        was_training = self.network.training
        self.network.eval()  # no dropout in the reference, even if the policy has some
        try:
            with disable_trained_adapter(self.network):
                return score(self.network, rows, logits, hidden, self.fused)
        finally:
            self.network.train(was_training)


class FrozenCopy:
    """A frozen copy of the policy as it is now; takes the memory of a second set of weights.

    Args:
        network: The policy, which is copied.
        fused: Compute log-probabilities as the policy does: see `temper.models.score.score`.
    """

    def __init__(self, network: nn.Module, fused: bool = False) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.fused = fused

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
        """See `Reference`; logits and hidden states are not cached."""
        if logits or hidden:
            raise ValueError("a cache of reference log-probabilities keeps sums only")
        device = rows["ids"].device
        if self.tables[stream].device != device:
            self.tables[stream] = self.tables[stream].to(device)
        return SequenceScores(self.tables[stream][rows["ids"]])


# -- the disk cache, shared by all runs with the same model, rows and tokenizer

# Keys of a config that do not change the network's outputs.
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")
BATCH_SIZE = 32  # default number of rows per forward pass while the cache is filled


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
    """Return the reference log-probability of every row of a pool, from disk if it is cached.

    Otherwise the log-probabilities are computed and stored.

    Args:
        network: The reference model; its training mode does not change.
        source: A stream's source with a fixed pool of rows: ``pool`` and ``fingerprint()``.
        tokenizer: Part of the cache key: its vocabulary and templates give the ids their meaning.
        folder: Folder of the cache.
        stream: Name of the stream, for errors.
        batch_size: Rows per forward pass; None takes `BATCH_SIZE`.
        fused: Compute in chunks, without all logits at once: see `temper.models.score.score`.
        precision: The Trainer's precision, part of the cache key; the caller enters its autocast
            context.

    Returns:
        Sums over the labelled tokens of each sequence, by row number: ``n`` or ``n x 2``, nats, on
        the CPU.

    Raises:
        TemperError: the stream has no fixed pool of rows, or its rows are not numbered.
    """
    pool = getattr(source, "pool", None)
    if pool is None:
        raise TemperError(
            f"model.init_args.reference=cached: the stream {stream!r} makes rows as it goes; use"
            " reference=frozen"
        )
    shape = _pool_shape(pool)
    key = cache_key(network, f"{source.fingerprint()} {shape} {precision}", tokenizer)
    path = folder / f"{key}.safetensors"
    sums = _load_sums(path, shape[:-1])
    if sums is None:
        sums = _compute_sums(network, pool, batch_size or BATCH_SIZE, fused, stream)
        _save_sums(path, sums)
    return sums


def cache_key(network: nn.Module, data_hash: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of the weights, the rows, and the tokenizer with its chat template.

    An adapter whose B is zero, as a new one's is, does not change the outputs and is left out: its
    A is random, so that every run would have its own key.
    """
    digest = hashlib.sha256(data_hash.encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(str(tokenizer.chat_template).encode())
    state = network.state_dict()
    unused = {
        name.replace("lora_B", factor)
        for name, tensor in state.items()
        if "lora_B" in name and not tensor.any()
        for factor in ("lora_A", "lora_B")
    }
    digest.update(
        _describe_config(
            network, any("lora_B" in name and name not in unused for name in state)
        ).encode()
    )
    for name, tensor in sorted(state.items()):
        if name not in unused:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:32]


def _describe_config(network: nn.Module, adapted: bool) -> str:
    """Settings that change a network's outputs: heads, rotary base, epsilons, adapter scale, ..."""
    every: dict[str, Any] = network.config.to_dict()  # type: ignore[union-attr,operator]
    config = {name: value for name, value in every.items() if name not in IGNORED_CONFIG_KEYS}
    adapters = getattr(network, "peft_config", {}) if adapted else {}
    scales = {name: (c.r, c.lora_alpha, c.use_rslora, c.use_dora) for name, c in adapters.items()}
    return f"{sorted(config.items(), key=str)} {sorted(scales.items())}"


def _load_sums(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Load a cached table; None if the file is missing or damaged (disk full, partial copy)."""
    try:
        sums = load_file(path)["sums"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return sums if sums.shape == shape else None


def _save_sums(path: Path, sums: Tensor) -> None:
    """Save a table under a temporary name and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(descriptor)
    try:
        save_file({"sums": sums}, temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _pool_shape(pool: Any) -> tuple[int, ...]:
    """Number of rows, of sequences per row if there are several, and of tokens of the longest."""
    lengths = pool.lengths
    return (*lengths.shape, int(lengths.max()))


@torch.no_grad()
def _compute_sums(
    network: nn.Module, pool: Any, batch_size: int, fused: bool, stream: str
) -> Tensor:
    """Score all rows of a pool, in evaluation mode; see `reference_sums`."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        sums = []
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
            sums.append(score(network, batch, fused=fused).sums.cpu())
        return torch.cat(sums)
    finally:
        network.train(was_training)
