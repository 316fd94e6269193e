"""The console command ``temper VERB ...``: one dispatcher over all verbs.

Verbs that run a Trainer are those of ``python train.py``; the others are modules of
`temper.cli.verbs`. Nothing is imported before a verb is chosen, so that the help is quick.
"""

import ast
import importlib
import os
import select
import sys
from pathlib import Path
from typing import TextIO

from temper import __version__
from temper.errors import TemperError, did_you_mean

TRAINER_VERBS = {
    "fit": "Train a model, evaluate it and export it.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data.",
    "predict": "Run a model on the prediction data.",
    "preview": "Show the data as the model will see them, without loading weights.",
    "plan": "Estimate memory and time of a run, without loading weights or data.",
    "export": "Write a model, or a checkpoint of it, as a Hugging Face folder.",
}
VERBS_FOLDER = Path(__file__).parent / "verbs"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Words after ``temper``; None takes those of this process.

    Returns:
        The exit status: 0; 2 after a user's error, which is one line on standard error; 130 when
        interrupted from the keyboard; 141 when the reader of the output has left, as ``| head``
        does; otherwise what the verb exits with.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _run(words)
        sys.stdout.flush()  # here, where a closed pipe is still caught
        return status
    except BrokenPipeError:
        if _has_reader(sys.stdout):
            raise  # another pipe of the program
        # Python flushes once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(words: list[str]) -> int:
    """Run a verb and turn what ends it into an exit status."""
    try:
        return _dispatch(words)
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as exiting:
        return _status(exiting)


def _has_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are reported without being asked for
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(words: list[str]) -> int:
    verb, *rest = words or [""]
    if verb in ("-h", "--help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"temper {__version__}")
        return 0
    _refuse_another_copy()
    if verb in TRAINER_VERBS:
        run = importlib.import_module("temper.cli.main").main
        _make_current_folder_importable()
        # Lightning warns of words that are not those of the process.
        run(None if words == sys.argv[1:] else words, prog="temper")
        return 0
    if verb in verb_modules():
        status: int = importlib.import_module(f"temper.cli.verbs.{verb}").main(rest)
        return status
    known = ", ".join((*TRAINER_VERBS, *verb_modules()))
    if not verb:
        raise TemperError(f"a verb is missing; give one of {known}, or see temper --help")
    hint = did_you_mean(verb, (*TRAINER_VERBS, *verb_modules()), f"accepted: {known}")
    raise TemperError(f"unknown verb {verb!r}; {hint} (all verbs: temper --help)")


def verb_modules() -> dict[str, str]:
    """Verbs that are modules of `temper.cli.verbs`, with their help lines."""
    return {
        path.stem: _first_line(path)
        for path in sorted(VERBS_FOLDER.glob("*.py"))
        if not path.stem.startswith("_")
    }


def help_text() -> str:
    """The help of ``temper``: every verb in one line."""
    lines = [
        "usage: temper VERB [OPTIONS]",
        "",
        "Safety-tune causal language models, attack them by fine-tuning, measure what survived.",
    ]
    groups = {"Verbs of the Trainer": TRAINER_VERBS, "Other verbs": verb_modules()}
    for title, verbs in groups.items():
        lines += ["", f"{title}:"]
        lines += [f"  {verb:<10} {text}" for verb, text in verbs.items()]
    lines += ["", "temper VERB --help shows the options of a verb; temper --version the version."]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    """First line of a module's docstring, without importing the module."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert text is not None, f"{path}: a verb has a docstring, whose first line is its help"
    return text.splitlines()[0]


def _refuse_another_copy() -> None:
    """Refuse to mix the installed package with modules of a checkout that is the current folder.

    Raises:
        TemperError: the current folder has a ``temper`` package that is not the one that runs.
    """
    running = Path(__file__).resolve().parents[1]
    here = Path("temper").resolve()
    if (here / "cli" / "console.py").is_file() and here != running:
        raise TemperError(
            f"this folder has a temper package of its own, and the command is that of {running};"
            " use the environment of this checkout, or python -m temper.cli.console here"
        )


def _make_current_folder_importable() -> None:
    """Let configs name classes of modules in the current folder, as ``python train.py`` does."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def _status(exiting: SystemExit) -> int:
    """The exit status of a SystemExit; a text is printed, as Python does."""
    if exiting.code is None:
        return 0
    if isinstance(exiting.code, int):
        return exiting.code
    print(exiting.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
