"""Where models are: folders, names on the hub, the base of an adapter, the tokenizer."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from temper.errors import TemperError

# MERGED from temper.models.folder: What a user says about a network.


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
        seed: Seed of the weights, on its own, so that data and weights can be varied apart.
    """

    hidden_size: int = 96
    n_layers: int = 3
    n_heads: int = 4
    intermediate_size: int = 256
    max_length: int = 256
    seed: int = 0


@dataclass
class LoRASpec:
    """A low-rank adapter (Hu et al. 2021), through PEFT. Its weights are fp32, whatever the base
    is.

    Args:
        rank: Rank of the update.
        alpha: Scale; the update is ``alpha / rank * B A``.
        targets: Names of the linear layers that get one, or ``all-linear`` for every one but the
            output layer.
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
    """Where the network comes from; give exactly one of ``path`` and ``shape``.

    Weights are read from safetensors only, never from pickles.

    Args:
        path: Folder in Hugging Face format: config.json, safetensors, tokenizer; or a LoRA adapter
            folder (adapter_config.json), whose base is loaded with it; or a name on the hub
            (``org/name``), which is taken from the local cache.
        revision: Branch, tag or commit of a hub name; None is its main branch.
        local_files_only: Never fetch anything; false lets a hub name that is not cached be fetched.
        trust_remote_code: Run Python code that comes with the model. Only for authors you trust.
        shape: Build with random weights instead.
        lora: Train a new low-rank adapter and freeze the rest.
        adapter: What to do with an adapter found in ``path``: ``continue`` training it, ``merge``
            it into the weights first, or keep it frozen beside the ``new`` one that ``lora``
            describes. Robustness figures depend on it: state it.
        dtype: Precision of frozen and fully trained weights. LoRA weights are always fp32.
        attention: Attention implementation; None lets transformers choose.
        activation_checkpointing: Compute the activations of every decoder layer again in the
            backward pass instead of keeping them: the same gradients, less memory, about a third
            more time.
        compile: Compile every decoder layer (torch.compile). The first steps take minutes.
        quantization: Hold the frozen base in 4 bits (``nf4``, double quantisation) or 8 bits
            (``int8``), through bitsandbytes; needs an adapter to train. Products are computed in
            ``dtype``.
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
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILES = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
]  # what is fetched from a hub, beside weights: no pickles
WEIGHTS = "*.safetensors"
DOUBLES = ["original/*", "consolidated*"]  # the same weights again, in other tools' formats


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole network."""
    return (folder / "adapter_config.json").exists()


def model_folder(
    path: str,
    revision: str | None = None,
    local_files_only: bool = True,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """The folder that a path or a hub name stands for.

    Args:
        path: A folder, or ``org/name``.
        revision: Branch, tag or commit of a hub name.
        local_files_only: Look in the local cache only; otherwise what is missing there is fetched.
        trust_remote_code: Fetch Python files too.
        weights: Fetch the weights too.

    Raises:
        TemperError: no such folder, nor a model of that name in the cache (or on the hub); a
            revision of a folder.
    """
    if path and Path(path).is_dir():
        if revision is not None:
            raise TemperError(
                f"{FLAG}.revision={revision}: path={path} is a folder, which has no revisions; drop"
                " it, or give a hub name"
            )
        return Path(path)
    if not HUB_NAME.fullmatch(path):
        raise TemperError(
            f"{FLAG}.path={path}: no such folder; give a folder with config.json, such as a run's"
            " export/"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = [*FILES, *([WEIGHTS] if weights else []), *(["*.py"] if trust_remote_code else [])]
    try:
        fetched = snapshot_download(
            path,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=files,
            ignore_patterns=DOUBLES,
        )
        return Path(fetched)
    except (OSError, ValueError, HfHubHTTPError) as error:
        of = f" (revision {revision})" if revision else ""
        if local_files_only:
            raise TemperError(
                f"{FLAG}.path={path}: no such folder, and no model of that name{of} in the local"
                " hub cache; give a folder with config.json, such as a run's export/, or let it be"
                f" fetched from the hub: --{FLAG}.local_files_only=false"
            ) from error
        raise TemperError(
            f"{FLAG}.path={path}: no such folder, and the hub did not give a model of that"
            f" name{of}: {first_line(error)}; check name, network and access (hf auth login; some"
            " models ask for consent on their page)"
        ) from error


def spec_folder(spec: NetworkSpec, weights: bool = True) -> Path:
    """`model_folder` of a spec's path."""
    return model_folder(
        str(spec.path), spec.revision, spec.local_files_only, spec.trust_remote_code, weights
    )


def base_folder(folder: Path, spec: NetworkSpec, weights: bool = True) -> Path:
    """The folder of the network that an adapter was trained on.

    Raises:
        TemperError: it is gone.
    """
    config = read_json(folder / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    try:
        return model_folder(
            str(base or ""),
            None if base and Path(base).is_dir() else revision,
            spec.local_files_only,
            spec.trust_remote_code,
            weights,
        )
    except TemperError as error:
        raise TemperError(
            f"{FLAG}.path={spec.path}: its adapter_config.json names the base {base}, which is no"
            " folder and not in the hub cache; put it back, edit base_model_name_or_path, or set"
            " local_files_only=false if it is a hub name"
        ) from error


def tokenizer_folder(spec: NetworkSpec) -> Path:
    """Where the tokenizer of a network is: beside it, or beside the base of an adapter that came
    without one. Fetches no weights.

    Raises:
        TemperError: as `model_folder`; or there is none.
    """
    folder = spec_folder(spec, weights=False)
    places = (
        [folder, base_folder(folder, spec, weights=False)]
        if is_adapter(folder) and not _has_tokenizer(folder)
        else [folder]
    )
    for place in places:
        if _has_tokenizer(place):
            return place
    raise TemperError(
        f"{FLAG}.path={spec.path}: no tokenizer.json in it; save the tokenizer beside the model"
        " (tokenizer.save_pretrained)"
    )


def read_json(path: Path) -> dict[str, Any]:
    """What is in a JSON file of a model folder.

    Raises:
        TemperError: it is not an object in JSON.
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
    """What an error says, without what follows it."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).rstrip(".")


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    )
