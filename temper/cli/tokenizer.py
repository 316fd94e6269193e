"""Data that need a tokenizer take the model's, unless they are given another."""

from typing import Any

from temper.errors import TemperError
from temper.models.folder import tokenizer_folder
from temper.models.spec import NetworkSpec


def fill_tokenizer(config: Any) -> None:
    """Set ``data.init_args.tokenizer`` to the folder of the model's tokenizer where it is null, and trust it as the model is trusted.

    An adapter folder without a tokenizer stands for its base. Data without such an argument bring their own.

    Args:
        config: The verb's config, changed in place.

    Raises:
        TemperError: the network is built from a shape, so there is no tokenizer to take; or its folder has none.
    """
    arguments = config.data.get("init_args") or {}
    if "tokenizer" not in arguments or arguments["tokenizer"] is not None:
        return
    network = (config.model.get("init_args") or {}).get("network") or {}
    if network.get("path") is None:
        raise TemperError(
            f"data.init_args.tokenizer is not set, and data={config.data.class_path.rpartition('.')[2]} needs one: the network has no "
            "folder to take it from (model.init_args.network.path); give a folder with tokenizer.json"
        )
    spec = NetworkSpec(**{name: network[name] for name in ("path", "revision", "local_files_only", "trust_remote_code")})
    arguments["tokenizer"] = str(tokenizer_folder(spec))
    if arguments.get("trust_remote_code", False) is None:
        arguments["trust_remote_code"] = spec.trust_remote_code
