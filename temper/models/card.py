"""The model card of an export, written from the files of a run folder.

It holds no text of prompts or answers, and no absolute paths.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from temper.models.folder import HUB_NAME, NetworkSpec
from temper.models.quantize import quantization_settings
from temper.packages import installed_version
from temper.run_folder import CARD, EVALUATION

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
        "import torch\nfrom peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.DTYPE)"
    ),
    "quantized": (
        "import torch\nfrom peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer, BitsAndBytesConfig\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "quantized = BitsAndBytesConfig(ARGUMENTS)\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(\n"
        "    folder, dtype=torch.DTYPE, quantization_config=quantized\n)"
    ),
}
DECODING = (
    "Temper decodes greedily (`do_sample=False`); the prompt format is the tokenizer's chat"
    " template, if it has one."
)


def model_card(
    spec: NetworkSpec,
    form: str,
    run: Path | None = None,
    step: int = 0,
    note: str = "",
    decoding: str = "",
) -> str:
    """Write the model card of an export, in Markdown.

    Args:
        spec: Settings that the network was loaded with; they give the base model.
        form: A key of `FORMS`.
        run: Run folder of the training; the card uses its ``config.yaml``, ``card.json`` and
            ``evaluation.json``, if they exist. None: the network was not trained.
        step: Optimizer steps that the weights were trained for; cost and evaluation after another
            number of steps are left out.
        note: Sentences on how the folder compares with the network that was trained.
        decoding: A sentence on settings of its generation config.
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
        "form": f"{FORMS[form]} {note}".strip(),
        "snippet": _snippet(spec, library),
        "decoding": f"{DECODING} {decoding}".strip(),
        "versions": ", ".join([*packages, f"Python {platform.python_version()}"]),
    }
    return environment.get_template("card.md.jinja").render(run_fields | fields)


def adapter_note(spec: NetworkSpec | None, base: str) -> str:
    """README.md of an adapter that is kept beside an export: what it is and how to load it.

    Args:
        spec: Settings of the network; None: unknown.
        base: Folder or hub name of the base model; empty if it is in none.
    """
    title = "# LoRA adapter, as it was trained (float32)\n\n"
    if not base:
        return (
            f"{title}Its base model is in no folder: it has random weights, or an adapter was"
            " merged into it before training. The config.yaml of the run builds it again.\n"
        )
    snippet = _snippet(spec or NetworkSpec(path=base), "peft")
    return f"{title}Base model: {shorten_path(base)}\n\n```python\n{snippet}\n```\n"


def _snippet(spec: NetworkSpec, library: str) -> str:
    """Code that loads an export; an adapter's base in the precision of training."""
    if library != "peft":
        return SNIPPETS[library]
    if spec.quantization is None:
        return SNIPPETS["peft"].replace("DTYPE", spec.dtype)
    settings = quantization_settings(spec)["quantization_config"].to_diff_dict()
    arguments = [
        f"{name}=torch.{value}" if name.endswith("dtype") else f"{name}={value!r}"
        for name, value in settings.items()
        if name.startswith(("load_in", "bnb")) and value
    ]
    filled = SNIPPETS["quantized"].replace("ARGUMENTS", ", ".join(arguments))
    return filled.replace("DTYPE", spec.dtype)


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
