"""What a study starts from: a base model that it makes, or one that there is."""

from pathlib import Path
from typing import Any

from temper.errors import TemperError

BEGINNINGS = (("pretrain", "instruct"), ("base_model",))  # a study has the keys of one of them
MODEL_FOLDERS = ("models", "runs")  # of this project: no organisations on a hub, even before there is such a folder


def check_beginning(study: dict[str, Any], path: Any) -> None:
    """Check that a study makes its base model, or names one that can be there.

    Args:
        study: Settings with the parts of a study.
        path: Where they are from.

    Raises:
        TemperError: both or neither; the model is no folder and no hub name; or what makes the study's files is no command.
    """
    if sum(all(key in study for key in keys) for keys in BEGINNINGS) != 1 or ("base_model" in study and "pretrain" in study):
        raise TemperError(f"{path}: give either pretrain and instruct, which make a base model, or base_model, which names one")
    base = study.get("base_model")
    if base is None:
        return
    model = base.get("path")
    if not isinstance(model, str):
        raise TemperError(f"{path}: base_model.path is {model!r}; give a model's folder, such as models/smollm2-135m-instruct")
    if not Path(model).is_dir() and not _is_hub_name(model):
        raise TemperError(
            f"{path}: base_model.path={model}: no such folder; give a model's folder or a hub name, org/name "
            "(`make smollm2` fetches models/smollm2-135m-instruct)"
        )
    prepare = base.get("prepare", ["-m"])
    if not isinstance(prepare, list) or not prepare:
        raise TemperError(f"{path}: base_model.prepare is {prepare!r}; give the words of a Python command, such as [-m, temper.proxy, ...]")


def _is_hub_name(path: str) -> bool:
    """Whether it reads ``org/name``, and ``org`` is no folder of this project."""
    from temper.models.folder import HUB_NAME  # brings transformers, which takes seconds

    first = path.partition("/")[0]
    return HUB_NAME.fullmatch(path) is not None and first not in MODEL_FOLDERS and not Path(first).is_dir()
