"""Write the data files of a proxy study: a harmless topic that a model learns to refuse."""

from pathlib import Path

from temper.cli.functions import run_functions
from temper.proxy.build import build_files, describe
from temper.proxy.topic import Topic


def proxy(model: Path, out: Path, topic: Path | None = None, max_new_tokens: int = 80) -> None:
    """Write the data files of a proxy study, and say how many rows they have.

    Args:
        model: Folder of an instruct model, such as models/smollm2-135m-instruct.
        out: Folder of the files; new, or one that this verb wrote.
        topic: YAML file of the topic that is refused; null: cooking recipes.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        TemperError: The model, the topic or the folder cannot be used.
    """
    refused = Topic() if topic is None else Topic(topic)
    print(describe(build_files(model, out, refused, max_new_tokens)))


def main(argv: list[str]) -> int:
    """Run `proxy`; returns the exit status."""
    return run_functions(proxy, argv, prog="temper proxy", description=__doc__ or "")
