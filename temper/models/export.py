"""Export a network as a folder that plain transformers (or PEFT) loads, with a model card.

The card is written from the files of a run folder. It holds no text of prompts or answers, and no
absolute paths.
"""

import copy
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from temper.output_folder import staging_folder
from temper.packages import installed_version
from temper.run_folder import CARD, EVALUATION

# -- exporting

WRITER = "temper export"  # in the marker of the folder
Dtype = Literal["float32", "bfloat16", "float16"]
MIN_MERGE_COSINE = 0.999  # a merge that keeps less of an adapter's change gives a warning
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def export_network(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    merge: bool,
    card: str | Callable[[nn.Module], str] | None = None,
    stop_ids: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    flag: str = "--folder",
) -> None:
    """Save weights (safetensors), config, tokenizer, generation config and card in a folder.

    An earlier export is replaced in one move (`temper.output_folder`). The network in training does
    not change. Sampling settings of the base model are kept.

    Args:
        network: A transformers model, or a PEFT model around one.
        tokenizer: Saved in the same folder, with its chat template.
        folder: Target; it never holds an incomplete export.
        merge: Merge LoRA weights into the base model, which is dequantized first if it is
            quantized; otherwise only the adapter of a PEFT model is saved.
        card: Text of README.md (`model_card`), or a function that makes it from the network that is
            saved; None writes no README.md.
        stop_ids: Tokens that end an answer; None keeps those of the network's generation config.
        dtype: Precision of the saved weights, unless only an adapter is saved; None: their own.
        flag: Option that gave the folder, for errors.

    Raises:
        TemperError: only the adapter would be saved, and its base model is in no folder; or the
            target holds files that Temper did not write.
    """
    adapter_only = not merge and is_adapted(network)
    with staging_folder(folder, flag, WRITER) as staging:
        saved: Any = network
        if adapter_only:
            save_adapter(network, staging)
            _generation_config(network, tokenizer, stop_ids).save_pretrained(staging)
        else:
            saved = merged_copy(network, dtype) if is_adapted(network) else _cast(network, dtype)
            before = saved.generation_config
            try:
                saved.generation_config = _generation_config(network, tokenizer, stop_ids)
                saved.save_pretrained(staging)
            finally:
                saved.generation_config = before
        tokenizer.save_pretrained(staging)
        # PEFT writes a README.md that names local folders.
        (staging / "README.md").unlink(missing_ok=True)
        if card is not None:
            text = card if isinstance(card, str) else card(saved)
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
    flag: str = "--folder",
) -> None:
    """Export the network of an objective, with the tokenizer of its data and a model card.

    Args:
        module: Has ``network``, and a ``network_spec`` for the card; without that there is no card.
        data: Has ``tokenizer``, and maybe ``stop_ids``, the tokens that end an answer.
        folder: Target.
        merge: As for `export_network`.
        run: Run folder that the card is written from; None: the network was not trained.
        step: Optimizer steps that the weights were trained for.
        network: Network to export instead of ``module.network``, whose weights may be sharded over
            ranks.
        dtype: Precision of the saved weights by torch's name, unless only an adapter is saved;
            None: their own.
        flag: Option that gave the folder, for errors.
    """
    spec: Any = getattr(module, "network_spec", None)
    network = module.network if network is None else network
    form = "whole"
    if is_adapted(network):
        form = "merged" if merge else "adapter"

    def make_card(saved: nn.Module) -> str:
        rounding = _describe_rounding(network, saved) if form == "merged" else ""
        return model_card(spec, form, run, step, rounding)

    export_network(
        network,
        data.tokenizer,
        folder,
        merge,
        card=None if spec is None else make_card,
        stop_ids=getattr(data, "stop_ids", None),
        dtype=None if dtype is None else getattr(torch, dtype),
        flag=flag,
    )


def _cast(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The network in a precision: itself if it has that precision, otherwise a copy."""
    same = dtype is None or all(
        parameter.dtype == dtype
        for parameter in network.parameters()
        if parameter.is_floating_point()
    )
    return network if same else copy.deepcopy(network).to(dtype)


def _describe_rounding(network: nn.Module, merged: nn.Module) -> str:
    """A sentence for the card on the precision that merging lost; warns if it lost much."""
    if is_quantized(network):
        return "The base model was quantized; its weights were dequantized before merging."
    cosine = merge_cosine(network, merged)
    precision = str(next(merged.parameters()).dtype).removeprefix("torch.")
    if cosine >= MIN_MERGE_COSINE:
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
    """The network's generation config, with the pad and stop tokens of training."""
    config = copy.deepcopy(network.generation_config)
    config.pad_token_id = tokenizer.pad_token_id
    if stop_ids:
        config.eos_token_id = list(stop_ids)
    if not config.do_sample:
        # Published configs have these next to do_sample=false, and transformers refuses to save
        # such a config once it has been changed.
        for name in SAMPLING:
            setattr(config, name, None)
    return config


# -- the model card

TEMPLATES = Path(__file__).parent
MAX_SETTING = 200  # characters of a setting's value
# Settings of a network that the card gives elsewhere, or that do not describe it.
NETWORK_SOURCE = ("path", "shape", "revision", "local_files_only", "trust_remote_code")
# Settings of data that do not change the rows.
MACHINE_SETTINGS = ("tokenizer", "cache", "num_workers")
PACKAGES = ("temper-lm", "torch", "transformers", "peft", "lightning")
COSTS = {
    "tokens": "tokens read in training",
    "trained_tokens": "tokens trained on",
    "seconds": "seconds",
}
FORMS = {
    "adapter": "This folder holds only a LoRA adapter; load it on its base model.",
    "merged": "The trained adapter is merged into the weights.",
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
DECODING = (
    "Temper decodes greedily (`do_sample=False`); the prompt format is the tokenizer's chat"
    " template, if it has one."
)


def model_card(
    spec: NetworkSpec, form: str, run: Path | None = None, step: int = 0, rounding: str = ""
) -> str:
    """Write the model card of an export, in Markdown.

    Args:
        spec: Settings that the network was loaded with; they give the base model.
        form: A key of `FORMS`.
        run: Run folder of the training; the card uses its ``config.yaml``, ``card.json`` and
            ``evaluation.json``, if they exist. None: the network was not trained.
        step: Optimizer steps that the weights were trained for; cost and evaluation after another
            number of steps are left out.
        rounding: A sentence on the precision that merging an adapter lost.
    """
    base = _describe_base(spec)
    library = "peft" if form == "adapter" else "transformers"
    objective: str | None = None
    run_fields: dict[str, Any] = {}
    if run is not None:
        run_fields = _describe_run(run, step)
        objective = run_fields["objective"]
    packages = [f"{name} {installed_version(name)}" for name in PACKAGES]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    fields = {
        "front": yaml.safe_dump(_front_matter(spec, library), sort_keys=False).strip(),
        "title": f"{base}, {objective}" if objective else base,
        "base": base,
        "objective": objective,
        "form": f"{FORMS[form]} {rounding}".strip(),
        "snippet": SNIPPETS[library],
        "decoding": DECODING,
        "versions": ", ".join([*packages, f"Python {platform.python_version()}"]),
    }
    return environment.get_template("card.md.jinja").render(run_fields | fields)


def _describe_run(run: Path, step: int) -> dict[str, Any]:
    """Fields of the card on training, data and evaluation, from the files of a run folder."""
    config = _read_file(run / "config.yaml")
    card = _read_file(run / CARD)
    evaluation = _read_file(run / EVALUATION)
    model = config.get("model", {})
    data = config.get("data", {})
    arguments = model.get("init_args") or {}
    # After another number of steps, the run went on from the checkpoint that is exported here.
    if evaluation.get("step") != step:
        evaluation = {}
    cost = card.get("cost", {})
    if cost.get("steps") != step:
        cost = {}
    rows = card.get("data_rows", {})
    hashes = card.get("data_sha256", {})
    return {
        "objective": _class_name(
            model.get("class_path") or card.get("objective") or "an unnamed objective"
        ),
        "settings": [
            *_list_settings(arguments, ("network",)),
            *_list_inner_settings("network", arguments.get("network"), NETWORK_SOURCE),
        ],
        "cost": [(title, f"{cost[name]:,}") for name, title in COSTS.items() if name in cost],
        "data": _class_name(data.get("class_path") or card.get("data") or "unnamed data"),
        "data_settings": list(_list_settings(data.get("init_args"), MACHINE_SETTINGS)),
        "streams": [
            (name, f"{rows[name]:,} rows, " if name in rows else "", sha[:16])
            for name, sha in hashes.items()
        ],
        "metrics": list(_format_metrics(evaluation.get("metrics", {}))),
        "judge": evaluation.get("judge"),
        "step": f"{step:,}",
    }


def _read_file(path: Path) -> dict[str, Any]:
    """Contents of a YAML or JSON file; empty if there is no such file."""
    if not path.exists():
        return {}
    load = yaml.safe_load if path.suffix == ".yaml" else json.loads
    content: dict[str, Any] = load(path.read_text())
    return content


def _front_matter(spec: NetworkSpec, library: str) -> dict[str, Any]:
    """YAML header that the hub reads; it names the base model if that is on the hub."""
    on_hub = spec.path and HUB_NAME.fullmatch(spec.path) and not Path(spec.path).exists()
    return {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["temper", "safety", "research"],
        **({"base_model": spec.path} if on_hub else {}),
    }


def _describe_base(spec: NetworkSpec) -> str:
    """The base model in words: its shortened path and revision, or its shape."""
    if spec.path is not None:
        revision = f" ({spec.revision})" if spec.revision else ""
        return f"{shorten_path(spec.path)}{revision}"
    assert spec.shape is not None
    return (
        f"A network from random weights (hidden size {spec.shape.hidden_size},"
        f" {spec.shape.n_layers} layers)"
    )


def _list_settings(
    arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Names and values of settings that are not null, as cells of a Markdown table.

    Settings of a class in another setting follow it, as ``optimizer.lr``.
    """
    for name, value in (arguments or {}).items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, dict) and "class_path" in value:
            yield name, _class_name(value["class_path"])
            yield from _list_inner_settings(name, value.get("init_args"))
            continue
        short = _shorten_paths(value)
        text = short if isinstance(short, str) else json.dumps(short)
        if len(text) > MAX_SETTING:
            text = f"{text[:MAX_SETTING]} ..."
        yield name, text.replace("|", "\\|").replace("\n", " ")


def _list_inner_settings(
    name: str, arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Settings of a class in the setting ``name``, without those that are false.

    Optimizers have many switches that are off.
    """
    return (
        (f"{name}.{inner}", text)
        for inner, text in _list_settings(arguments, leave_out)
        if text != "false"
    )


def shorten_path(text: str) -> str:
    """Shorten an absolute path to its last two components; other text is returned unchanged."""
    path = PurePath(text)
    if path.is_absolute() and len(path.parts) > 1:
        return "/".join(path.parts[-2:])
    return text


def _shorten_paths(value: Any) -> Any:
    """Shorten every absolute path in a value, also in dicts and lists."""
    if isinstance(value, dict):
        return {name: _shorten_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(inner) for inner in value]
    return shorten_path(value) if isinstance(value, str) else value


def _format_metrics(metrics: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Metrics in per cent, with their 95 % intervals."""
    for name, metric in metrics.items():
        low = 100 * metric["ci_low"]
        high = 100 * metric["ci_high"]
        yield {
            "name": name.replace("_", " "),
            "value": f"{100 * metric['value']:.1f}",
            "interval": f"{low:.1f} to {high:.1f}",
            "n": metric["n"],
        }


def _class_name(class_path: str) -> str:
    return class_path.rpartition(".")[2]
