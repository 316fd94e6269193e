"""A hash of the code that a stage can depend on: what its classes import, without comments.

Modules are followed by their import statements, from the classes that a stage's configs name. The
``__init__`` of a package that only collects names (``lightning_modules``, ``temper.judges``, ...)
is a table: a name imported through it leads to the one module that defines it, not to all of them.
"""

import ast
import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PLUGINS = ("lightning_modules", "datamodules", "callbacks", "strategies")  # short names are theirs
DATA = (".jinja", ".yaml", ".css")  # files that a module reads from its own folder
UNCOUNTED = ("__all__", "__version__")

Reference = tuple[str, str | None]  # a module, and the name that is taken from it


@dataclass(frozen=True)
class _Module:
    """One file: a digest of what it does, and what it refers to."""

    digest: bytes
    references: frozenset[Reference]
    table: dict[str, Reference]  # of a package: names that it takes from its own modules


class Code:
    """The Python files below a folder, read once.

    Args:
        root: Folder that holds the packages.
    """

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self.module = cache(self._module)
        self.file = cache(self._file)

    def digest(
        self,
        names: Iterable[str],
        without: Collection[str] = (),
        but: Collection[str] = (),
    ) -> str:
        """Hash of all that names depend on; see `closure`."""
        found = hashlib.sha256()
        for name in sorted(self.closure(names, without, but)):
            found.update(name.encode() + self.module(name).digest)
        return found.hexdigest()[:16]

    def closure(
        self,
        names: Iterable[str],
        without: Collection[str] = (),
        but: Collection[str] = (),
    ) -> set[str]:
        """Modules that names depend on.

        Args:
            names: Modules, classes by their path or by the short name of a plugin; others (words
                of a config that name no code of ours) are left out.
            without: Packages and modules that are not followed.
            but: Modules of these that are, all the same.
        """
        todo = [place for name in names for place in self._named(name)]
        seen: set[str] = set()
        while todo:
            name = todo.pop()
            if name in seen or (name not in but and _is_below(name, without)):
                continue
            seen.add(name)
            for reference in self.module(name).references:
                todo.extend(self._defined(*reference))
        return seen

    def _named(self, name: str) -> Iterator[str]:
        """Modules that a word of a config or of a command stands for."""
        if not all(part.isidentifier() for part in name.split(".")):
            return
        if "." not in name:
            for package in PLUGINS:
                if self.file(package) and name in self.module(package).table:
                    yield from self._defined(package, name)
        if self.file(name):
            yield from self._defined(name, None)
        parent, dot, last = name.rpartition(".")
        if dot and self.file(parent):
            yield from self._defined(parent, last)

    def _defined(self, name: str, attribute: str | None) -> Iterator[str]:
        """The modules that are read for a name: where it is defined, and the packages above."""
        parts = name.split(".")
        for end in range(1, len(parts)):
            if self.file(above := ".".join(parts[:end])):
                yield above
        if not self.file(name):
            return
        yield name
        if attribute is None:
            return
        if attribute == "*":
            for one in self.module(name).table:
                yield from self._defined(name, one)
        elif self.file(f"{name}.{attribute}"):
            yield f"{name}.{attribute}"
        elif attribute in self.module(name).table:
            yield from self._defined(*self.module(name).table[attribute])

    def _file(self, name: str) -> Path | None:
        stem = self.root.joinpath(*name.split("."))
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if path.is_file():
                return path
        return None

    def _module(self, name: str) -> _Module:
        path = self.file(name)
        assert path is not None
        tree = ast.parse(path.read_text(encoding="utf-8"))
        table: dict[str, Reference] = {}
        if path.name == "__init__.py":
            tree.body, table = _without_table(tree.body, name)
        tree = _Bare().visit(tree)
        digest = hashlib.sha256(ast.dump(tree).encode())
        for data in _data_files(tree, path.parent):
            digest.update(data.name.encode() + data.read_bytes())
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        references = set(_references(tree, package))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        references |= {reference for one, reference in table.items() if one in used}
        return _Module(digest.digest(), frozenset(references), table)


def _is_below(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


class _Bare(ast.NodeTransformer):
    """Leaves out docstrings, what only a type checker reads, and names that say nothing of what a
    module does.
    """

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A string that stands alone is a docstring."""
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        """``if TYPE_CHECKING:``."""
        if "TYPE_CHECKING" in ast.dump(node.test):
            return [self.visit(one) for one in node.orelse]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        """``__all__`` and the version."""
        names = {getattr(target, "id", None) for target in node.targets}
        return None if names & set(UNCOUNTED) else self.generic_visit(node)


def _without_table(
    body: list[ast.stmt], package: str
) -> tuple[list[ast.stmt], dict[str, Reference]]:
    """The code of an ``__init__``, and the names that it only passes on."""
    rest: list[ast.stmt] = []
    table: dict[str, Reference] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            source = _source(node, package)
            if _is_below(source, (package,)) and source != package:
                for alias in node.names:
                    table[alias.asname or alias.name] = (source, alias.name)
                continue
        rest.append(node)
    return rest, table


def _source(node: ast.ImportFrom, package: str) -> str:
    """The module that a ``from`` names, relative or not."""
    if not node.level:
        return node.module or ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def _references(tree: ast.AST, package: str) -> Iterator[Reference]:
    """Every import in a module, wherever it stands."""
    plain: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield _source(node, package), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                plain[alias.asname or alias.name] = alias.name
                yield alias.name, None
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), None
    if not plain:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (known := plain.get(ast.unparse(node.value))):
            yield known, node.attr


def _data_files(tree: ast.AST, folder: Path) -> list[Path]:
    """Templates and tables beside a module that it names."""
    names = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.endswith(DATA)
        and len(node.value) > len(".yaml")
    }
    return sorted(path for name in names if (path := folder / name).is_file())
