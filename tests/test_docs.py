"""The documentation agrees with the code: files, names, headings and lists exist."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import callbacks
import train
from temper.cli.main import VERBS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# mkdocs checks the links of docs/, but not those of the pages beside it.
LINKS = [
    (page, target)
    for page in ("README.md", "CONTRIBUTING.md")
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text())
]


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


def _commands(page: str) -> list[str]:
    """The commands of a page, each on one line."""
    return [
        line for block in _blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]


def _cells(page: str, column: int) -> list[str]:
    """A column of the tables of a page."""
    rows = [
        line.split("|")[1:-1]
        for line in (DOCS / page).read_text().splitlines()
        if line.startswith("|")
    ]
    return [row[column] for row in rows if len(row) > column]


@pytest.mark.parametrize(
    ("page", "target"), [link for link in LINKS if not link[1].startswith("http")]
)
def test_a_link_leads_to_a_file_and_a_heading(page, target):
    name, _, heading = target.partition("#")
    path = ROOT / (name or page)
    assert path.exists()
    if heading:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        assert heading in {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
        }


def test_the_entry_point_names_every_verb():
    assert train.__doc__ is not None
    assert set(VERBS) <= set(re.findall(r"\w+", train.__doc__))


def test_every_callback_is_named_where_one_is_added():
    text = (DOCS / "add-callback.md").read_text()
    assert [name for name in callbacks.__all__ if f"`{name}`" not in text] == []


def test_an_objective_is_listed_with_the_data_of_its_config():
    rows = list(zip(_cells("methods.md", 1), _cells("methods.md", 2), strict=False))
    for name in ("tar", "lisa", "safe_instruct", "repnoise"):
        (data,) = re.findall(
            r"configs/data/(\w+)\.yaml", (ROOT / f"configs/objective/{name}.yaml").read_text()
        )
        assert [cell.strip() for objective, cell in rows if objective.strip() == f"`{name}`"] == [
            f"`{data}`"
        ]


def test_a_list_of_callbacks_keeps_those_of_the_trainer_config():
    usual = {
        one["class_path"]
        for one in yaml.safe_load((ROOT / "configs/trainer/cpu.yaml").read_text())["trainer"][
            "callbacks"
        ]
    }
    lists = [
        found["callbacks"]
        for text in _blocks("evaluation.md", "yaml")
        if "callbacks" in (found := yaml.safe_load(text)["trainer"])
    ]
    assert lists and all(usual <= {one["class_path"] for one in chosen} for chosen in lists)


def test_stored_answers_are_judged_on_their_own_data():
    ways = [
        # an option can be written with or without `init_args.`
        re.findall(r"configs/data/\w+|--data\.\S+", line.replace(".init_args.", "."))
        for page in ("index.md", "evaluation.md")
        for line in _commands(page)
        if "runs/check" in line
    ]
    assert len(ways) == 2 and ways[0] == ways[1] != []


def test_every_file_of_a_run_folder_is_described(tiny_run):
    described = {
        name.rstrip("/")
        for cell in _cells("concepts.md", 0)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    assert {path.name for path in tiny_run.iterdir()} <= described


def _index_entries(kind: str) -> list[str]:
    """The lines ``- KIND: ...`` of the paper index, each joined to one line."""
    text = (DOCS / "paper_index.md").read_text()
    return [
        re.sub(r"\s+", " ", entry)
        for entry in re.findall(rf"^- {kind}: (.*(?:\n {{4}}.*)*)", text, re.M)
    ]


def _defined_in(path: Path) -> set[str]:
    """Names that a module, or the modules of a folder, define: classes, functions, arguments and
    variables; methods also as ``Class.method``.
    """
    found: set[str] = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.ClassDef(name=name, body=body):
                    methods = [each for each in body if isinstance(each, ast.FunctionDef)]
                    found |= {name, *(f"{name}.{method.name}" for method in methods)}
                case ast.FunctionDef(name=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
    return found


def test_every_path_of_the_paper_index_exists():
    paths = [
        name
        for name in re.findall(r"`([^`\n]+)`", (DOCS / "paper_index.md").read_text())
        if re.fullmatch(r"[\w*.-]+(/[\w*.-]*)+", name)
    ]
    assert len(paths) > 100
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


def test_every_name_of_the_paper_index_is_in_its_file():
    undefined = []
    for entry in _index_entries("Code"):
        defined: set[str] = set()
        for name in re.findall(r"`([^`]+)`", entry):
            if "/" in name:
                defined = _defined_in(ROOT / name)
            elif name not in defined:
                undefined.append((name, entry))
    assert undefined == []


def test_every_entry_of_the_paper_index_has_code_and_tests():
    code = _index_entries("Code")
    tests = _index_entries("Test")
    assert len(code) == len(tests) > 20
    assert all("tests/" in entry for entry in tests)


def test_the_reference_lists_every_module_once():
    modules = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(), re.M)
    assert [name for name, n in Counter(modules).items() if n > 1] == []
    files = {name: ROOT / f"{name.replace('.', '/')}.py" for name in modules}
    assert [name for name, file in files.items() if not file.is_file()] == []
