"""Write a network as a folder that plain transformers (or PEFT) loads."""

import copy
import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import nn
from transformers import PreTrainedTokenizerBase

from temper.models.folder import HUB_NAME, NetworkSpec
from temper.models.lora import is_adapted, merge_cosine, merged_copy, save_adapter
from temper.models.quantize import is_quantized
from temper.run_folder import CARD, EVALUATION, replace_folder

# MERGED from temper.models.export: The model card of an export, from what a run leaves behind: no
# text of prompts or answers, no paths of a machine.


HERE = Path(__file__).parent
LONGEST = 200  # characters of a setting
WHERE = (
    "path",
    "shape",
    "revision",
    "local_files_only",
    "trust_remote_code",
)  # of a network: told apart from the settings
MACHINE = ("tokenizer", "cache", "num_workers")  # of data: nothing that changes the rows
PACKAGES = ("temper-lm", "torch", "transformers", "peft", "lightning")
COSTS = {"tokens": "tokens trained on", "seconds": "seconds"}
FORMS = {
    "adapter": "This folder holds a LoRA adapter alone; it is loaded on its base.",
    "merged": "The adapter that was trained is merged into the weights.",
    "whole": "This folder holds the whole network.",
}
SNIPPETS = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)"
    ),
    "peft": (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)"
    ),
}


def model_card(
    spec: NetworkSpec, form: str, run: Path | None = None, step: int = 0, rounding: str = ""
) -> str:
    """Write the card.

    Args:
        spec: Where the network came from.
        form: A key of `FORMS`.
        run: Run folder of the training: its ``config.yaml``, ``card.json`` and ``evaluation.json``
            are read, as far as they are there. None: nothing was trained.
        step: Optimizer steps behind the weights; an evaluation after another number of steps, and
            the cost of another number, is not theirs, and left out.
        rounding: What merging an adapter lost, in words.
    """
    config, card, evaluation = ({}, {}, {}) if run is None else _read(run)
    model, data = config.get("model", {}), config.get("data", {})
    arguments = model.get("init_args") or {}
    if evaluation.get("step") != step:
        evaluation = {}
    cost = card.get("cost", {})
    if cost.get("steps") != step:  # the weights are those of a checkpoint, and the run went on
        cost = {}
    library = "peft" if form == "adapter" else "transformers"
    objective = (
        None
        if run is None
        else _name(model.get("class_path") or card.get("objective") or "an unnamed objective")
    )
    rows, hashes = card.get("data_rows", {}), card.get("data_sha256", {})
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    base = _base(spec)
    return environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(_front(spec, library), sort_keys=False).strip(),
        title=f"{base}, {objective}" if objective else base,
        base=base,
        objective=objective,
        settings=[
            *_settings(arguments, ("network",)),
            *_inner("network", arguments.get("network"), WHERE),
        ],
        cost=[(title, f"{cost[name]:,}") for name, title in COSTS.items() if name in cost],
        data=_name(data.get("class_path") or card.get("data") or "unnamed data"),
        data_settings=list(_settings(data.get("init_args"), MACHINE)),
        streams=[
            (name, f"{rows[name]:,} rows, " if name in rows else "", sha[:16])
            for name, sha in hashes.items()
        ],
        figures=list(_figures(evaluation.get("metrics", {}))),
        judge=evaluation.get("judge"),
        step=f"{step:,}",
        form=f"{FORMS[form]} {rounding}".strip(),
        snippet=SNIPPETS[library],
        decoding=(
            "Temper decodes greedily (`do_sample=False`); the prompt format is the tokenizer's chat"
            " template, if it has one."
        ),
        versions=", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        + f", Python {platform.python_version()}",
    )


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    files = (run / "config.yaml", run / CARD, run / EVALUATION)
    found = [
        (
            (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
            if path.exists()
            else {}
        )
        for path in files
    ]
    return found[0], found[1], found[2]


def _front(spec: NetworkSpec, library: str) -> dict[str, Any]:
    """What the hub reads; a base is named there only by its name on the hub."""
    hub_name = (
        spec.path
        if spec.path and HUB_NAME.fullmatch(spec.path) and not Path(spec.path).exists()
        else None
    )
    named = {"base_model": hub_name} if hub_name else {}
    return {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["temper", "safety", "research"],
        **named,
    }


def _base(spec: NetworkSpec) -> str:
    if spec.path is not None:
        return f"{plain(spec.path)}{f' ({spec.revision})' if spec.revision else ''}"
    assert spec.shape is not None
    return (
        f"A network from random weights (hidden size {spec.shape.hidden_size},"
        f" {spec.shape.n_layers} layers)"
    )


def _settings(
    arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Arguments that say something, with those of classes in them, as cells of a table."""
    for name, value in (arguments or {}).items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, dict) and "class_path" in value:
            yield name, _name(value["class_path"])
            yield from _inner(name, value.get("init_args"))
        else:
            text = plain(value) if isinstance(value, str) else json.dumps(_plain(value))
            yield (
                name,
                (text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
                .replace("|", "\\|")
                .replace("\n", " "),
            )


def _inner(
    name: str, arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Arguments of a part; switches that are off, of which optimizers have many, say nothing."""
    return (
        (f"{name}.{inner}", text)
        for inner, text in _settings(arguments, leave_out)
        if text != "false"
    )


def plain(text: str) -> str:
    """A path of this machine by its last two parts; other text as it is."""
    return (
        "/".join(PurePath(text).parts[-2:])
        if PurePath(text).is_absolute() and len(PurePath(text).parts) > 1
        else text
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return plain(value) if isinstance(value, str) else value


def _figures(metrics: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    for name, figure in metrics.items():
        low, high = 100 * figure["ci_low"], 100 * figure["ci_high"]
        yield {
            "name": name.replace("_", " "),
            "value": f"{100 * figure['value']:.1f}",
            "interval": f"{low:.1f} to {high:.1f}",
            "n": figure["n"],
        }


def _name(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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
    """Save weights (safetensors), config, tokenizer, generation config and card; replaces the
    folder in one move.

    The network in training is left as it is. Sampling settings that came with the base stay as they
    were.

    Args:
        network: A transformers model, or a PEFT model around one.
        tokenizer: Saved beside it, with its chat template.
        folder: Target; a half-written export is never seen under this name.
        merge: Merge LoRA weights into the base, which is made dense if it is held in few bits;
            otherwise a PEFT model is saved adapter-only.
        card: What stands in README.md (`temper.models.export.model_card`), or makes it of the plain
            network that is written; None writes none.
        stop_ids: Tokens that end an answer; None: as the network's generation config has it.
        dtype: Precision of a plain network that is written; None: its own.

    Raises:
        TemperError: adapter-only, and the base of the adapter is in no folder.
    """
    alone = not merge and is_adapted(network)
    with staging_folder(folder) as staging:
        if alone:
            save_adapter(network, staging)
            _generation_config(network, tokenizer, stop_ids).save_pretrained(staging)
        else:
            exported: Any = (
                merged_copy(network, dtype) if is_adapted(network) else _in(network, dtype)
            )
            before = exported.generation_config
            try:
                exported.generation_config = _generation_config(network, tokenizer, stop_ids)
                exported.save_pretrained(staging)
            finally:
                exported.generation_config = before
        tokenizer.save_pretrained(staging)
        (staging / "README.md").unlink(
            missing_ok=True
        )  # PEFT's, which names folders of this machine
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
        module: Has ``network``; its ``network_spec`` says where that came from, and without it
            there is no card.
        data: Has ``tokenizer``; its ``stop_ids``, if any, end an answer.
        folder: Target.
        merge: As for `export_network`.
        run: Run folder that the card is written from; None: nothing was trained.
        step: Optimizer steps behind the weights.
        network: What is exported in place of ``module.network``, whose weights may be cut over
            ranks.
        dtype: Precision of a plain network that is written, by torch's name; None: its own.
    """
    spec: Any = getattr(module, "network_spec", None)
    network = module.network if network is None else network
    form = "whole" if not is_adapted(network) else "merged" if merge else "adapter"

    def card(written: nn.Module) -> str:
        return model_card(
            spec, form, run, step, _rounding(network, written) if form == "merged" else ""
        )

    stop_ids, to = getattr(data, "stop_ids", None), None if dtype is None else getattr(torch, dtype)
    export_network(
        network, data.tokenizer, folder, merge, None if spec is None else card, stop_ids, to
    )


def _in(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a precision; a copy, if it is in another."""
    same = dtype is None or all(
        parameter.dtype == dtype
        for parameter in network.parameters()
        if parameter.is_floating_point()
    )
    return network if same else copy.deepcopy(network).to(dtype)


def _rounding(network: nn.Module, merged: nn.Module) -> str:
    """What merging lost, in words for the card; warned about if it is much."""
    if is_quantized(network):
        return "The base was held in few bits; it was made dense first."
    cosine, precision = (
        merge_cosine(network, merged),
        str(next(merged.parameters()).dtype).removeprefix("torch."),
    )
    if cosine >= FAITHFUL:
        return ""
    warnings.warn(
        f"merging rounded to {precision}: cosine {cosine:.3f} between the change that training made"
        " and what is left of it. Export with dtype=float32 (twice the size), or the adapter alone"
        " (merge=false), to keep it as it was trained",
        stacklevel=2,
    )
    return (
        f"The sum was rounded to {precision}: the cosine between the change that training made and"
        f" what is left of it is {cosine:.3f}."
    )


def _generation_config(
    network: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None
) -> Any:
    """How the network decodes, with the padding and the end tokens that answers were trained and
    generated with.
    """
    config = copy.deepcopy(network.generation_config)
    config.pad_token_id = tokenizer.pad_token_id
    if stop_ids:
        config.eos_token_id = list(stop_ids)
    if not config.do_sample:
        # Published configs hold these beside do_sample=false, and transformers refuses to save such
        # a config once it was changed.
        for name in SAMPLING:
            setattr(config, name, None)
    return config


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of ``folder`` if the body succeeds and
    goes away if it raises.
    """
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
