"""Commands of the documentation: every block is marked, and is typed as its mark says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from temper.errors import TemperError
from tools import docs_commands
from tools.docs_commands import PAGES, all_blocks, compose_only, main, read_blocks

ROOT = Path(__file__).parents[2]
PAGE = """\
<!-- run -->

```bash
mkdir -p runs/one
echo one \\
    two > runs/one/file
```

- In a list:

    <!-- not run: needs a queue -->

    ```bash
    sbatch x
    ```
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A checkout with one page of the given text."""

    def write(text):
        (tmp_path / "page.md").write_text(text)
        monkeypatch.setattr(docs_commands, "PAGES", ("page.md",))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return write


def test_every_page_with_commands_is_read():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {str(page.relative_to(ROOT)) for page in pages if "```bash" in page.read_text()}
    assert found <= set(PAGES)


def test_every_block_of_the_documentation_is_marked():
    blocks = all_blocks(ROOT)
    count = sum((ROOT / page).read_text().count("```bash") for page in PAGES)
    assert len(blocks) == count > 20
    assert {block.kind for block in blocks} == {"run", "long", "cluster", "not run"}


def test_no_command_hides_in_a_block_of_another_language():
    for page in PAGES:
        for text in re.findall(r"```(?!bash)\w*\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            assert not text.startswith((".venv/bin/", "make ", "temper ", "sbatch ")), (page, text)


def test_a_block_has_its_line_kind_and_commands():
    first, second = read_blocks("page.md", PAGE)
    assert (first.line, first.kind, first.reason) == (4, "run", "")
    assert first.commands == ["mkdir -p runs/one", "echo one      two > runs/one/file"]
    assert first.folders == {"runs/one"}
    assert (second.kind, second.reason, second.commands) == (
        "not run",
        "needs a queue",
        ["sbatch x"],
    )


@pytest.mark.parametrize(
    "mark", ["", "<!-- often -->\n", "<!-- not run -->\n", "<!-- run: x -->\n"]
)
def test_a_block_without_a_known_mark_is_refused(mark):
    with pytest.raises(TemperError, match=r"^page.md:\d: the block has the mark"):
        list(read_blocks("page.md", f"{mark}```bash\nls\n```\n"))


def test_commands_are_typed_as_they_stand(site):
    root = site(PAGE)
    assert main(["run"]) == 0
    assert (root / "runs/one/file").read_text() == "one two\n"


def test_a_failing_command_stops_with_its_place(site, capfd):
    site("<!-- run -->\n\n```bash\nfalse\ntouch after\n```\n")
    assert main(["run"]) == 2
    assert capfd.readouterr().err == "error: page.md:4: the commands ended with status 1\n"
    assert not Path("after").exists()


def test_a_run_folder_that_exists_is_not_written_to(site, capfd):
    root = site(PAGE)
    (root / "runs/one").mkdir(parents=True)
    assert main(["run"]) == 2
    assert "runs/one: the commands would write there" in capfd.readouterr().err
    assert list((root / "runs/one").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "tried"),
    [
        (
            "sbatch --nodes=1 slurm/train.sbatch --config a.yaml --x=1",
            ".venv/bin/temper fit --config a.yaml --x=1 --print_config=skip_null",
        ),
        (".venv/bin/temper fit --x=1", ".venv/bin/temper fit --x=1 --print_config=skip_null"),
        (".venv/bin/temper study s.yaml", ".venv/bin/temper study s.yaml --dry-run"),
        ("mkdir -p runs", "mkdir -p runs"),
    ],
)
def test_a_cluster_command_is_composed_only(command, tried):
    assert compose_only(command) == tried


def test_a_config_that_does_not_compose_fails(site, capfd):
    root = site("<!-- cluster -->\n\n```bash\n.venv/bin/temper fit --no.such=1\n```\n")
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/temper").write_text(
        f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -m temper.cli.console "$@"\n'
    )
    (root / ".venv/bin/temper").chmod(0o755)
    assert main(["cluster"]) == 2
    assert "page.md:4: the commands ended with status 2" in capfd.readouterr().err


def test_data_of_users_is_not_committed():
    named = subprocess.run(
        ["git", "check-ignore", "data/harmful.jsonl"], cwd=ROOT, capture_output=True, text=True
    )
    assert named.stdout == "data/harmful.jsonl\n"
