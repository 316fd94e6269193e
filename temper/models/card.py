"""The model card of an export, from what a run leaves behind: no text of prompts or answers, no paths of a machine."""

import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from temper.models.folder import HUB_NAME
from temper.models.spec import NetworkSpec
from temper.run_folder import CARD, EVALUATION

HERE = Path(__file__).parent
LONGEST = 200  # characters of a setting
WHERE = ("path", "shape", "revision", "local_files_only", "trust_remote_code")  # of a network: told apart from the settings
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


def model_card(spec: NetworkSpec, form: str, run: Path | None = None, step: int = 0, rounding: str = "") -> str:
    """Write the card.

    Args:
        spec: Where the network came from.
        form: A key of `FORMS`.
        run: Run folder of the training: its ``config.yaml``, ``card.json`` and ``evaluation.json`` are read, as far as they
            are there. None: nothing was trained.
        step: Optimizer steps behind the weights; an evaluation after another number of steps, and the cost of another number, is not
            theirs, and left out.
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
    objective = None if run is None else _name(model.get("class_path") or card.get("objective") or "an unnamed objective")
    rows, hashes = card.get("data_rows", {}), card.get("data_sha256", {})
    environment = Environment(loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    base = _base(spec)
    return environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(_front(spec, library), sort_keys=False).strip(),
        title=f"{base}, {objective}" if objective else base,
        base=base,
        objective=objective,
        settings=[*_settings(arguments, ("network",)), *_inner("network", arguments.get("network"), WHERE)],
        cost=[(title, f"{cost[name]:,}") for name, title in COSTS.items() if name in cost],
        data=_name(data.get("class_path") or card.get("data") or "unnamed data"),
        data_settings=list(_settings(data.get("init_args"), MACHINE)),
        streams=[(name, f"{rows[name]:,} rows, " if name in rows else "", sha[:16]) for name, sha in hashes.items()],
        figures=list(_figures(evaluation.get("metrics", {}))),
        judge=evaluation.get("judge"),
        step=f"{step:,}",
        form=f"{FORMS[form]} {rounding}".strip(),
        snippet=SNIPPETS[library],
        decoding="Temper decodes greedily (`do_sample=False`); the prompt format is the tokenizer's chat template, if it has one.",
        versions=", ".join(f"{name} {_version(name)}" for name in PACKAGES) + f", Python {platform.python_version()}",
    )


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    files = (run / "config.yaml", run / CARD, run / EVALUATION)
    found = [(yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text()) if path.exists() else {} for path in files]
    return found[0], found[1], found[2]


def _front(spec: NetworkSpec, library: str) -> dict[str, Any]:
    """What the hub reads; a base is named there only by its name on the hub."""
    hub_name = spec.path if spec.path and HUB_NAME.fullmatch(spec.path) and not Path(spec.path).exists() else None
    named = {"base_model": hub_name} if hub_name else {}
    return {"library_name": library, "pipeline_tag": "text-generation", "tags": ["temper", "safety", "research"], **named}


def _base(spec: NetworkSpec) -> str:
    if spec.path is not None:
        return f"{plain(spec.path)}{f' ({spec.revision})' if spec.revision else ''}"
    assert spec.shape is not None
    return f"A network from random weights (hidden size {spec.shape.hidden_size}, {spec.shape.n_layers} layers)"


def _settings(arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Arguments that say something, with those of classes in them, as cells of a table."""
    for name, value in (arguments or {}).items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, dict) and "class_path" in value:
            yield name, _name(value["class_path"])
            yield from _inner(name, value.get("init_args"))
        else:
            text = plain(value) if isinstance(value, str) else json.dumps(_plain(value))
            yield name, (text if len(text) <= LONGEST else f"{text[:LONGEST]} ...").replace("|", "\\|").replace("\n", " ")


def _inner(name: str, arguments: Mapping[str, Any] | None, leave_out: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Arguments of a part; switches that are off, of which optimizers have many, say nothing."""
    return ((f"{name}.{inner}", text) for inner, text in _settings(arguments, leave_out) if text != "false")


def plain(text: str) -> str:
    """A path of this machine by its last two parts; other text as it is."""
    return "/".join(PurePath(text).parts[-2:]) if PurePath(text).is_absolute() and len(PurePath(text).parts) > 1 else text


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
