"""Files that no test here runs, the GPU checks and the benchmarks, import names that exist."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("temper", "callbacks", "datamodules", "lightning_modules", "strategies", "tests")
FILES = [path for place in ("tests/gpu", "benchmarks") for path in (ROOT / place).rglob("*.py")]
UNRUN = sorted(str(path.relative_to(ROOT)) for path in FILES)


def _imports(tree: ast.AST):
    """Modules and names that a file takes from our packages, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("name", UNRUN)
def test_every_imported_name_exists(name):
    for module, attribute in _imports(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        found = importlib.import_module(module)
        if not hasattr(found, attribute):
            importlib.import_module(f"{module}.{attribute}")
