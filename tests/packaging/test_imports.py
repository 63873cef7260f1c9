"""The Python package in wings: imports go one way, in no circle, and private names stay in their files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from repository import ROOT

PACKAGE = ROOT / "torch-ext" / "quantization_mlx"

# Each wing may import those before it. "" stands for the modules beside the wings, "__init__" for the package itself.
WINGS = ("", "nn", "quantization", "checkpoint", "families", "hf", "convert", "marlin", "cli", "__init__")
GENERATED = "_ops"  # by each build; the names of some ops in it begin with an underscore
# By Transformers, to a method of its experts, which one of ours takes the place of; by torch, to the number of a
# tensor's changes.
GIVEN = {"_apply_gate", "_version"}


class Source:
    """A module of the package: its name, relative to the package, and what it says."""

    def __init__(self, path: Path, root: Path) -> None:
        parts = path.relative_to(root).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.wing = parts[0] if len(parts) > 1 else "__init__" if parts[0].startswith("__") else ""
        self.tree = ast.parse(path.read_text())

    def origin(self, node: ast.ImportFrom) -> str:
        """The module of this package that a relative import names."""
        parts = self.name.split(".") if self.name else []
        ascended = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*ascended, *filter(None, [node.module])])

    def imports(self) -> Iterator[tuple[str, str, str]]:
        """(module, name, name here) of all relative imports, those inside of functions as well."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                for alias in node.names:
                    yield self.origin(node), alias.name, alias.asname or alias.name

    def own_private_names(self) -> set[str]:
        """What the file itself calls by names that begin with an underscore."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
                names.add(ast.literal_eval(node.args[0]))
        return {name for name in names if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_access_by_name(node: ast.AST) -> bool:
    known = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr")
    return known and isinstance(node.args[1], ast.Constant)


def read(root: Path) -> dict[str, Source]:
    files = (path for path in sorted(root.rglob("*.py")) if path.stem != GENERATED)
    return {source.name: source for source in (Source(path, root) for path in files)}


def arrows(sources: dict[str, Source]) -> dict[str, set[str]]:
    """The modules that each module imports; a name that is a module counts as that one."""
    return {
        name: {
            inner if (inner := f"{module}.{imported}".removeprefix(".")) in sources else module
            for module, imported, _ in source.imports()
            if module != GENERATED
        }
        - {name}
        for name, source in sources.items()
    }


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that are left when those that import none of the others have been taken away, again and again."""
    left = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    while free := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return sorted(left)


def upward_arrows(sources: dict[str, Source]) -> list[str]:
    rank = {wing: number for number, wing in enumerate(WINGS)}
    return [
        f"{name} imports {target}"
        for name, targets in arrows(sources).items()
        for target in sorted(targets)
        if rank[sources[target].wing] > rank[sources[name].wing]
    ]


def foreign_private_names(sources: dict[str, Source]) -> list[str]:
    """Private names of other files: imported, read from an imported module or class, or an attribute of an object that
    another file of this package gives to its own."""
    own = {name: source.own_private_names() for name, source in sources.items()}
    anywhere = set().union(*own.values()) - GIVEN
    found = []
    for name, source in sources.items():
        found += [f"{name} imports {module}.{each}" for module, each, _ in source.imports() if is_private(each)]
        names = {here for module, _, here in source.imports() if module != GENERATED}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                imported = isinstance(node.value, ast.Name) and node.value.id in names
                if imported or (node.attr in anywhere and node.attr not in own[name]):
                    found.append(f"{name} reads {ast.unparse(node)}")
            elif is_access_by_name(node) and node.args[1].value in anywhere - own[name]:
                found.append(f"{name} reads {ast.unparse(node)}")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return read(PACKAGE)


def test_no_circle(sources: dict[str, Source]) -> None:
    assert circles(arrows(sources)) == []


def test_arrows_go_one_way(sources: dict[str, Source]) -> None:
    assert {source.wing for source in sources.values()} == set(WINGS)
    assert upward_arrows(sources) == []


def test_private_names_stay_in_their_files(sources: dict[str, Source]) -> None:
    assert foreign_private_names(sources) == []


# What the tests find in a package that has these files beside nn/a.py, "def f(): return 1".
MISTAKES = {
    "circle": ({"nn/a.py": "from . import b", "nn/b.py": "def f():\n    from .a import f"}, ["nn.a", "nn.b"], [], []),
    "circle of three": (
        {"ops.py": "from .nn.a import f", "nn/a.py": "from .b import g", "nn/b.py": "from ..ops import h"},
        ["nn.a", "nn.b", "ops"],
        ["ops imports nn.a"],
        [],
    ),
    "upward": ({"nn/b.py": "from ..cli import main"}, [], ["nn.b imports cli"], []),
    "upward in a function": ({"ops.py": "def f():\n    from .hf import load"}, [], ["ops imports hf.load"], []),
    "private import": ({"cli/b.py": "from ..nn.a import _f"}, [], [], ["cli.b imports nn.a._f"]),
    "private of a module": ({"cli/b.py": "from ..nn import a\na._f()"}, [], [], ["cli.b reads a._f"]),
    "private of a class": ({"cli/b.py": "from ..nn.a import A\nA._g"}, [], [], ["cli.b reads A._g"]),
    "private of an object": (
        {"nn/a.py": "class A:\n    def _g(self): ...", "cli/b.py": "def f(a):\n    a._g()"},
        [],
        [],
        ["cli.b reads a._g"],
    ),
    "private of an object by its name": (
        {"nn/a.py": "class A:\n    def _g(self): ...", "cli/b.py": "def f(a):\n    getattr(a, '_g')"},
        [],
        [],
        ["cli.b reads getattr(a, '_g')"],
    ),
    "none": ({"nn/b.py": "from .a import f\nfrom .._ops import ops\nf()._parameters"}, [], [], []),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    files, *expected = MISTAKES[mistake]
    empty = dict.fromkeys(["__init__.py", "cli/__init__.py", "hf/__init__.py", "hf/load.py", "nn/__init__.py"], "")
    for name, text in {**empty, "nn/a.py": "def f(): return 1", **files}.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    sources = read(tmp_path)
    assert [circles(arrows(sources)), upward_arrows(sources), foreign_private_names(sources)] == expected
