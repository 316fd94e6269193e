"""Type the commands of the README and the documentation, as they stand.

    python -m tools.docs_commands run         # minutes; CI does this from a fresh clone
    python -m tools.docs_commands long        # needs `make demo`; an hour
    python -m tools.docs_commands cluster     # for a cluster; here their configs are composed

A comment before each block of commands tells its kind: ``<!-- run -->``, ``<!-- long -->``,
``<!-- cluster -->``, or ``<!-- not run: REASON -->`` for what is not a command by itself. Pages are
read from the working directory, blocks in the order of `PAGES`, so that a block can use what an
earlier one made. A folder of ``runs/`` that was there before is never written to.
"""

import argparse
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from temper.errors import TemperError

Kind = Literal["run", "long", "cluster", "not run"]
#: The README makes what the other pages use.
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/cli.md",
    "docs/methods.md",
    "docs/models.md",
    "docs/data.md",
    "docs/evaluation.md",
    "docs/studies.md",
    "docs/add-objective.md",
    "docs/add-callback.md",
    "docs/concepts.md",
    "docs/scale.md",
    "docs/slurm.md",
    "CONTRIBUTING.md",
)
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n\s*)?^(?P<indent> *)```bash\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
TRAINER_VERBS = ("fit", "validate", "test", "predict")


@dataclass(frozen=True)
class Block:
    """A block of shell commands on a page.

    Args:
        page: File, relative to the checkout.
        line: Line of its first command.
        kind: How it is tried.
        reason: Why it is not run; empty for the other kinds.
        text: The commands.
    """

    page: str
    line: int
    kind: Kind
    reason: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands, continuation lines joined, without comments and blank lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [
            line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")
        ]

    @property
    def folders(self) -> set[str]:
        """Folders of ``runs/`` that it names."""
        return set(re.findall(r"\bruns/[\w-]+", self.text))


def read_blocks(page: str, text: str) -> Iterator[Block]:
    """Blocks of shell commands on a page, in order.

    Raises:
        TemperError: a block has no mark, an unknown one, or no reason for not being run.
    """
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        kind, _, reason = (found["mark"] or "").partition(":")
        if kind not in get_args(Kind) or (kind == "not run") != bool(reason.strip()):
            raise TemperError(
                f"{page}:{line}: the block has the mark {found['mark']!r}; write <!-- run -->,"
                " <!-- long -->, <!-- cluster --> or <!-- not run: REASON --> before it"
            )
        yield Block(page, line, kind, reason.strip(), found["text"])  # type: ignore[arg-type]


def all_blocks(root: Path) -> list[Block]:
    """Blocks of all `PAGES` of a checkout."""
    return [
        block for page in PAGES for block in read_blocks(page, (root / page).read_text("utf-8"))
    ]


def compose_only(command: str) -> str:
    """The command that tries a cluster's command here: its config composed, or its jobs listed."""
    words = shlex.split(command)
    if words[0] == "sbatch":
        script = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
        return shlex.join(
            [".venv/bin/temper", "fit", *words[script + 1 :], "--print_config=skip_null"]
        )
    if words[0] == ".venv/bin/temper" and words[1] in TRAINER_VERBS:
        return shlex.join([*words, "--print_config=skip_null"])
    if words[0] == ".venv/bin/temper" and words[1] == "study":
        return shlex.join([*words, "--dry-run"])
    return command


def type_block(block: Block, root: Path) -> None:
    """Run a block's commands in one shell, which stops at the first that fails.

    Raises:
        TemperError: a command failed; its output was printed before.
    """
    text = block.text
    if block.kind == "cluster":
        text = "\n".join(map(compose_only, block.commands))
    print(f"\n== {block.page}:{block.line} ({block.kind})\n{text.rstrip()}\n", flush=True)
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status = subprocess.run(["bash", "-euo", "pipefail", "-c", text], cwd=root).returncode
    if status:
        raise TemperError(f"{block.page}:{block.line}: the commands ended with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    wall = time.monotonic() - start
    print(f"-- {block.page}:{block.line}: {wall:.0f} s, {cpu:.0f} CPU seconds", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Try all blocks of a kind; 0 if all went well, 2 at the first that did not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["run", "long", "cluster"])
    kind: Kind = parser.parse_args(argv).kind
    root = Path.cwd()
    try:
        blocks = [block for block in all_blocks(root) if block.kind == kind]
        if kind != "cluster":
            _check_new(set().union(*(block.folders for block in blocks)), root)
        for block in blocks:
            type_block(block, root)
    except TemperError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(blocks)} blocks of the kind {kind!r} ran without an error")
    return 0


def _check_new(folders: set[str], root: Path) -> None:
    """Refuse to write into run folders that there were before."""
    existing = sorted(folder for folder in folders if (root / folder).exists())
    if existing:
        raise TemperError(
            f"{', '.join(existing)}: the commands would write there; run them in a fresh clone, or"
            " move these away"
        )


if __name__ == "__main__":
    sys.exit(main())
