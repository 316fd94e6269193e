"""Settings of a network, and the model folder, base folder and tokenizer folder they refer to."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from temper.errors import TemperError
from temper.links import check_links

# -- settings

Attention = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]
Quantization = Literal["nf4", "int8"]


@dataclass
class ShapeSpec:
    """A Llama-style decoder with random weights.

    Args:
        hidden_size: Width of the residual stream.
        n_layers: Decoder layers.
        n_heads: Attention heads; must divide hidden_size.
        intermediate_size: Width of the gated MLP.
        max_length: Longest sequence, in tokens.
        seed: Seed of the weights; separate from the seed of the data, so that each can be varied
            alone.
    """

    hidden_size: int = 96
    n_layers: int = 3
    n_heads: int = 4
    intermediate_size: int = 256
    max_length: int = 256
    seed: int = 0


@dataclass
class LoRASpec:
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685), through PEFT, in float32.

    Args:
        rank: Rank of the update.
        alpha: Scale; the update is ``alpha / rank * B A``.
        targets: Names of the linear layers to adapt, or ``all-linear`` for every linear layer but
            the output layer.
        dropout: Dropout on the adapter's input. Booster's two harmful passes draw different masks.
    """

    rank: int = 16
    alpha: int = 16
    targets: list[str] | Literal["all-linear"] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    dropout: float = 0.0


@dataclass
class NetworkSpec:
    """Settings that load or build a network; give exactly one of ``path`` and ``shape``.

    Weights are read from safetensors only, never from pickles.

    Args:
        path: Folder in Hugging Face format: config.json, safetensors, tokenizer; or a LoRA adapter
            folder (adapter_config.json), whose base model is loaded with it; or a name on the hub
            (``org/name``), which is read from the local cache.
        revision: Branch, tag or commit of a hub name; None is its main branch.
        local_files_only: Never download; false downloads a hub name that is not cached.
        trust_remote_code: Run Python code that comes with the model. Only for authors you trust.
        shape: Build with random weights instead.
        lora: Train a new low-rank adapter and freeze the rest.
        adapter: How to use an adapter found in ``path``: ``continue`` training it, ``merge`` it
            into the weights first, or keep it frozen beside the ``new`` one that ``lora``
            describes. Robustness results depend on this choice: report it.
        dtype: Precision of frozen and fully trained weights. LoRA weights are always float32.
        attention: Attention implementation; None lets transformers choose.
        activation_checkpointing: Recompute the activations of every decoder layer in the backward
            pass instead of keeping them: the same gradients, less memory, about a third more time.
        compile: Compile every decoder layer (torch.compile). The first steps take minutes.
        quantization: Quantize the frozen base to 4 bits (``nf4``, double quantization) or 8 bits
            (``int8``), through bitsandbytes; needs an adapter to train. Matrix products are
            computed in ``dtype``.
    """

    path: str | None = None
    revision: str | None = None
    local_files_only: bool = True
    trust_remote_code: bool = False
    shape: ShapeSpec | None = None
    lora: LoRASpec | None = None
    adapter: Literal["continue", "merge", "new"] = "continue"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Attention | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    quantization: Quantization | None = None


FLAG = "model.init_args.network"

# -- folders

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# File patterns to download from the hub. Pickles are in none of them.
CONFIG_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
WEIGHT_PATTERN = "*.safetensors"
CODE_PATTERN = "*.py"
DUPLICATE_PATTERNS = ["original/*", "consolidated*"]  # the same weights in other tools' formats


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a whole network."""
    return (folder / "adapter_config.json").exists()


def model_folder(
    path: str,
    revision: str | None = None,
    local_files_only: bool = True,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """Return the folder of a model: a local path, or the cached snapshot of a hub name.

    Args:
        path: A folder, or ``org/name``.
        revision: Branch, tag or commit of a hub name.
        local_files_only: Look in the local cache only; otherwise missing files are downloaded.
        trust_remote_code: Download Python files too.
        weights: Download the weights too.

    Raises:
        TemperError: there is neither such a folder nor a model of that name in the cache (or on the
            hub); a revision is given for a folder; a link in the folder leaves it.
    """
    if path and Path(path).is_dir():
        if revision is not None:
            raise TemperError(
                f"{FLAG}.revision={revision}: path={path} is a folder, which has no revisions; drop"
                " it, or give a hub name"
            )
        check_links(Path(path), f"{FLAG}.path={path}")
        return Path(path)
    if not HUB_NAME.fullmatch(path):
        raise TemperError(
            f"{FLAG}.path={path}: no such folder; give a folder with config.json, such as a run's"
            " export/"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = list(CONFIG_PATTERNS)
    if weights:
        patterns.append(WEIGHT_PATTERN)
    if trust_remote_code:
        patterns.append(CODE_PATTERN)
    try:
        snapshot = snapshot_download(
            path,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=patterns,
            ignore_patterns=DUPLICATE_PATTERNS,
        )
        return Path(snapshot)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise TemperError(_explain_hub_error(path, revision, local_files_only, error)) from error


def _explain_hub_error(
    path: str, revision: str | None, local_files_only: bool, error: Exception
) -> str:
    at_revision = f" (revision {revision})" if revision else ""
    if local_files_only:
        return (
            f"{FLAG}.path={path}: no such folder, and no model of that name{at_revision} in the"
            " local hub cache; give a folder with config.json, such as a run's export/, or download"
            f" it from the hub: --{FLAG}.local_files_only=false"
        )
    return (
        f"{FLAG}.path={path}: no such folder, and the hub did not give a model of that"
        f" name{at_revision}: {first_line(error)}; check name, network and access (hf auth login;"
        " some models ask for consent on their page)"
    )


def spec_folder(spec: NetworkSpec, weights: bool = True) -> Path:
    """Return the `model_folder` of ``spec.path``."""
    return model_folder(
        str(spec.path), spec.revision, spec.local_files_only, spec.trust_remote_code, weights
    )


def base_folder(folder: Path, spec: NetworkSpec, weights: bool = True) -> Path:
    """Return the folder of the base model that an adapter was trained on.

    Args:
        folder: Folder of the adapter; its adapter_config.json names the base model.
        spec: Settings that the adapter is loaded with.
        weights: Download the weights of a base model on the hub.

    Raises:
        TemperError: the base model is neither a folder nor in the hub cache.
    """
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    revision = config.get("revision")
    try:
        return model_folder(
            str(base or ""),
            None if base and Path(base).is_dir() else revision,
            spec.local_files_only,
            spec.trust_remote_code,
            weights,
        )
    except TemperError as error:
        if base and Path(base).is_dir():  # it is there, with a link out of it
            raise
        raise TemperError(
            f"{FLAG}.path={spec.path}: its adapter_config.json names the base {base}, which is no"
            " folder and not in the hub cache; put it back, edit base_model_name_or_path, or set"
            " local_files_only=false if it is a hub name"
        ) from error


def tokenizer_folder(spec: NetworkSpec) -> Path:
    """Return the folder with a network's tokenizer, without downloading weights.

    That is the network's own folder, or its base model's for an adapter saved without a tokenizer.

    Raises:
        TemperError: as `model_folder`; or there is no tokenizer.
    """
    folder = spec_folder(spec, weights=False)
    if is_adapter(folder) and not _has_tokenizer(folder):
        folder = base_folder(folder, spec, weights=False)
    if _has_tokenizer(folder):
        return folder
    raise TemperError(
        f"{FLAG}.path={spec.path}: no tokenizer.json in it; save the tokenizer beside the model"
        " (tokenizer.save_pretrained)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        TemperError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TemperError(
            f"{FLAG}.path: {path} cannot be read: {first_line(error)}; save the model again"
            " (save_pretrained)"
        ) from error
    if not isinstance(content, dict):
        raise TemperError(
            f"{FLAG}.path: {path} holds no JSON object; save the model again (save_pretrained)"
        )
    return content


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).rstrip(".")


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    )
