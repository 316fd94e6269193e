"""The modules that a hash is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from temper.study import Study
from temper.study.closure import Code
from temper.study.contents import strings, training
from temper.study.stages import ALWAYS, NOT_IN_FIT, Stage

FILES = {
    "lightning_modules/__init__.py": '''"""Objectives."""
from lightning_modules.one import One
from lightning_modules.two import Two

__all__ = ["One", "Two"]
''',
    "lightning_modules/one.py": '''"""One."""
from typing import TYPE_CHECKING

import library.tools
from library import used

if TYPE_CHECKING:
    from library.types import Only


class One:
    """A class."""

    template = "page.jinja"

    def run(self) -> None:
        from library.later import late

        library.tools.work(used, late)
''',
    "lightning_modules/page.jinja": "a page",
    "lightning_modules/two.py": "from library import unused\n\n\nclass Two: ...\n",
    "library/__init__.py": """from library.used import used
from library.unused import unused

register()
""",
    "library/used.py": "from .relative import near\n\nused = 1\n",
    "library/relative.py": "near = 1\n",
    "library/unused.py": "unused = 1\n",
    "library/tools.py": "import importlib\n\nimportlib.import_module('library.named')\n",
    "library/named.py": "x = 1\n",
    "library/types.py": "class Only: ...\n",
    "library/later.py": "late = 1\n",
}


@pytest.fixture
def small(tmp_path) -> Path:
    """A project of a few modules."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_class_leads_to_its_imports_alone(small):
    assert Code(small).closure(["One"]) == {
        "lightning_modules",
        "lightning_modules.one",
        "library",
        "library.used",
        "library.relative",
        "library.tools",
        "library.named",
        "library.later",
    }
    assert Code(small).closure(["One"]) == Code(small).closure(["lightning_modules.One"])
    assert "library.used" not in Code(small).closure(["Two"])


def test_what_is_left_out_is_not_followed(small):
    found = Code(small).closure(["One"], without=["library"], but=["library.used"])
    assert found == {"lightning_modules", "lightning_modules.one", "library.used"}


@pytest.mark.parametrize("word", ["", "None", "a b", "torch.optim.AdamW", "../x", "one"])
def test_a_word_that_names_no_code_of_ours_leads_nowhere(small, word):
    assert Code(small).closure([word]) == set()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("lightning_modules/one.py", '"""A class."""', '"""Another text."""'),
        ("lightning_modules/one.py", "class One", "# a comment\nclass One"),
        ("lightning_modules/one.py", "import Only", "import Another"),
        ("lightning_modules/__init__.py", '"One", "Two"', '"Two", "One"'),
        ("lightning_modules/two.py", "Two", "Two2"),
        ("library/types.py", "Only", "Another"),
    ],
)
def test_a_change_that_changes_nothing_changes_no_hash(small, file, old, new):
    before = Code(small).digest(["One"])
    path = small / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert Code(small).digest(["One"]) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("lightning_modules/one.py", "work(used", "work(not used"),
        ("lightning_modules/page.jinja", "page", "sheet"),
        ("library/__init__.py", "register()", "register(1)"),
        ("library/relative.py", "1", "2"),
        ("library/later.py", "1", "2"),
        ("library/named.py", "1", "2"),
    ],
)
def test_a_change_of_what_is_used_changes_the_hash(small, file, old, new):
    before = Code(small).digest(["One"])
    path = small / file
    path.write_text(path.read_text().replace(old, new))
    assert Code(small).digest(["One"]) != before


# Packages of plugins import all their modules; here each module is imported by itself, so that
# what a fit has imported is what it needs.
ALONE = """
import importlib, json, sys, types

for name in ("lightning_modules", "datamodules", "callbacks"):
    package = types.ModuleType(name)
    package.__path__ = [name]
    sys.modules[name] = package
words = json.loads(sys.argv[1])
for name, classes in words["modules"].items():
    module = importlib.import_module(name)
    for one in classes:
        setattr(sys.modules[name.partition(".")[0]], one, getattr(module, one))
from temper.cli.main import main
sys.argv = ["train.py"]
main(words["command"])
ours = ("temper", "strategies", "lightning_modules", "datamodules", "callbacks")
found = [n for n, m in sys.modules.items() if n.partition(".")[0] in ours and m is not None]
print("FOUND" + json.dumps(found))
"""


def test_everything_that_a_fit_imports_is_in_its_hash(project_root, tmp_path):
    """Apart from what is named as having no part in it."""
    study = Study.load("studies/ci.yaml")
    few = {"trainer.max_steps": 1, "data.init_args.n_eval": 2, "data.init_args.n_alignment": 40}
    study.align.settings |= few | {"data.init_args.n_harmful": 20}
    stage = Stage(study, str(tmp_path), 0, "align/sft")
    command = stage.fit_command.split()[2:]
    command = [word for word in command if "network.path" not in word]
    modules = {
        "lightning_modules.sft": ["SFTModule"],
        "datamodules.synthetic_alignment": ["SyntheticAlignment"],
        "callbacks.safety_evaluation": ["SafetyEvaluation"],
        "callbacks.throughput": ["Throughput"],
        "callbacks.run_card": ["RunCard"],
        "callbacks.hf_export": ["HFExport"],
        "callbacks.preemption": ["Preemption"],
        "callbacks.answers": ["SaveAnswers"],
        "callbacks.start_checks": ["StartChecks"],
    }
    words = json.dumps({"modules": modules, "command": [*command, *TINY]})
    done = subprocess.run(
        [sys.executable, "-c", ALONE, words], cwd=project_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    imported = set(json.loads(done.stdout.partition("FOUND")[2]))
    contents = [training(content) for content in stage._contents]
    names = [*ALWAYS, "Preemption", *strings([contents, stage._settings])]
    hashed = Code().closure(names, NOT_IN_FIT)
    assert {"temper.losses.tokens", "temper.models.score", "strategies.select"} <= hashed
    left_out = imported - hashed
    no_part = {name for name in left_out if name.startswith(NOT_IN_FIT)}
    # `SafetyEvaluation` is built, and asked nothing.
    assert left_out - no_part <= {"callbacks.evaluation"} | TABLES


TINY = (
    "--model.init_args.network.shape.hidden_size=8",
    "--model.init_args.network.shape.n_layers=1",
    "--model.init_args.network.shape.n_heads=1",
)
# Imported by the __init__ of a package for names that nobody here takes from it, or by a judge.
TABLES = {"temper.models.reference", "temper.synthetic.checker"}
