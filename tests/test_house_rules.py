# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a program can check: layers, importers, includes, sizes, headers, words."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

RULES: dict[str, Any] = tomllib.loads((ROOT / "tests" / "house_rules.toml").read_text(encoding="utf-8"))
IMPORTERS: dict[str, list[str]] = RULES["importers"]
INCLUDES: dict[str, list[str]] = RULES["includes"]
MAX_LINES: dict[str, int] = RULES["max_lines"]
MAX_FILE_NBYTES = 1 << 20
PYTHON_SIDE = re.compile(r"Python\.h|pybind11/|torch/|ATen/|c10/|lmdb\.h")
# Split, so that this file passes its own rule.
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")

SOURCE_FOLDERS = ("kvstore", "retrieval", "kernels", "csrc", "tests", "benchmarks", "examples", "tools")
PACKAGE_FOLDERS = ("kvstore", "retrieval", "kernels")


def files_under(folder: str, *suffixes: str) -> list[Path]:
    """Real files below a root folder, each once: the two links inside kvstore are not followed."""
    found = []
    for here, folders, names in os.walk(ROOT / folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        found += [Path(here) / name for name in sorted(names) if Path(name).suffix in suffixes]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = [path for folder in SOURCE_FOLDERS for path in files_under(folder, *MAX_LINES)]
SOURCES += sorted(ROOT.glob("*.py"))
PYTHON = [path for path in SOURCES if path.suffix in {".py", ".pyi"}]
NATIVE = [path for path in SOURCES if path.suffix in {".cpp", ".hpp", ".cu", ".cuh"}]
PACKAGE = [path for path in PYTHON if relative(path).split("/")[0] in PACKAGE_FOLDERS]


def module_paths() -> dict[str, Path]:
    """Import name -> file, for all modules of the package, found as Python finds them: through the links."""
    modules = {}
    for here, folders, names in os.walk(ROOT / "kvstore", followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(".py"):
                parts = (Path(here) / name).relative_to(ROOT).with_suffix("").parts
                modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = Path(here) / name
    return modules


MODULES = module_paths()


class Import(NamedTuple):
    """One imported name: `from a import b` has module a and name a.b; `import a` has both a."""

    line: int
    module: str
    name: str


def imports(path: Path) -> Iterator[Import]:
    """Everything that a file imports, anywhere in it, deferred imports and import_module("...") too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, alias.name, alias.name) for alias in names)
            case ast.ImportFrom(names=names, level=level):
                module = "." * level + (node.module or "")
                yield from (Import(node.lineno, module, f"{module}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, name, name)


def target_module(name: str) -> str | None:
    """The module of this package that an imported name comes from; None for others' names."""
    while name.partition(".")[0] == "kvstore":
        if name in MODULES or name == "kvstore._native":  # the extension is no file of the package's
            return name
        name = name.rpartition(".")[0]
    return None


def ranks() -> dict[str, tuple[int, int]]:
    """Unit -> (height, room on its line)."""
    return {
        unit: (height, room)
        for height, line in enumerate(reversed(RULES["layers"]))
        for room, group in enumerate(line.split("|"))
        for unit in group.split()
    }


def faults(found: list[str]) -> str:
    return "\n" + "\n".join(found)


def test_modules_are_found_through_the_links() -> None:
    assert {"kvstore.errors", "kvstore.spec"} <= MODULES.keys()
    for folder in ("retrieval", "kernels"):
        assert (ROOT / "kvstore" / folder).readlink() == Path("..") / folder


def test_every_unit_has_a_layer() -> None:
    units = {name.split(".")[1] for name in MODULES if "." in name}
    assert units <= ranks().keys(), f"add to layers in house_rules.toml: {sorted(units - ranks().keys())}"


def test_imports_go_down_the_layers() -> None:
    rank = ranks()
    bad = []
    for name, path in MODULES.items():
        unit = f"{name}.".split(".")[1]
        for line, _, imported in imports(path):
            package, other = f"{imported}.".split(".")[:2]
            if package != "kvstore" or unit == other or not {unit, other} <= rank.keys():
                continue
            (height, room), (other_height, other_room) = rank[unit], rank[other]
            if not (other_height < height or (other_height == height and other_room == room)):
                bad.append(f"{relative(path)}:{line}: {unit} may not import {other}")
    assert not bad, faults(bad)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {}
    for name, path in MODULES.items():
        graph[name] = {target_module(imported) for _, _, imported in imports(path)} - {None, name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {error.args[1]}")


def test_nothing_inside_imports_the_package_root() -> None:
    bad = [
        f"{relative(path)}:{line}: write from kvstore.module import Name, not {name}"
        for path in MODULES.values()
        for line, module, name in imports(path)
        if (module == "kvstore" or (module == name and name.startswith("kvstore."))) and name != "kvstore._native"
    ]
    assert not bad, faults(bad)


def test_imports_are_absolute_and_never_from_the_root_folders() -> None:
    bad = [
        f"{relative(path)}:{line}: {name}"
        for path in PYTHON
        for line, _, name in imports(path)
        if name.startswith(".") or name.partition(".")[0] in {"kernels", "retrieval"}
    ]
    assert not bad, faults(bad)


@pytest.mark.parametrize("module", sorted(IMPORTERS))
def test_third_party_module_has_one_importer(module: str) -> None:
    bad = [
        f"{relative(path)}:{line}: {name}"
        for path in PACKAGE
        for line, _, name in imports(path)
        if f"{name}.".startswith(f"{module}.")
        and not any(fnmatch(relative(path), allowed) for allowed in IMPORTERS[module])
    ]
    assert not bad, faults(bad)


def test_includes_go_one_way() -> None:
    bad = []
    for path in files_under("csrc", ".cpp", ".hpp", ".cu", ".cuh"):
        folder = relative(path).split("/")[1]
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not (include := re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)):
                continue
            bracket, name = include.groups()
            first = name.split("/")[0]
            if folder != "bindings" and PYTHON_SIDE.match(name):
                bad.append(f"{relative(path)}:{number}: {name} belongs to bindings")
            elif bracket == '"' and not (first == folder or first in INCLUDES[folder]):
                bad.append(f"{relative(path)}:{number}: {folder} may not include {name} (paths start at csrc)")
    assert not bad, faults(bad)


def test_files_are_small() -> None:
    bad = []
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES[path.suffix]:
            bad.append(f"{relative(path)}: {lines} lines, at most {MAX_LINES[path.suffix]}")
    assert not bad, faults(bad)


def test_folders_are_small() -> None:
    most = RULES["max_in_folder"]
    files: dict[str, list[int]] = {}
    for path in SOURCES:
        if relative(path).split("/")[0] in {*PACKAGE_FOLDERS, "csrc"}:
            files.setdefault(relative(path.parent), []).append(len(path.read_text(encoding="utf-8").splitlines()))
    bad = [
        f"{folder}: {len(sizes)} files, {sum(sizes)} lines; at most {most['files']} and {most['lines']}"
        for folder, sizes in files.items()
        if len(sizes) > most["files"] or sum(sizes) > most["lines"]
    ]
    assert not bad, faults(bad)


def test_tracked_files_are_not_heavy() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    present = [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    bad = [
        f"{relative(path)}: {path.stat().st_size} bytes" for path in present if path.stat().st_size > MAX_FILE_NBYTES
    ]
    assert not bad, faults(bad)


def test_files_start_with_licence_and_purpose() -> None:
    bad = []
    for path in SOURCES:
        lines = [*path.read_text(encoding="utf-8").splitlines(), "", "", ""]
        first = 1 if lines[0].startswith("#!") else 0
        sign = "//" if path in NATIVE else "#"
        if lines[first] != f"{sign} SPDX-License-Identifier: Apache-2.0":
            bad.append(f"{relative(path)}: no SPDX line")
        elif path.suffix == ".py":
            if not ast.get_docstring(ast.parse("\n".join(lines))):
                bad.append(f"{relative(path)}: no docstring")
        elif not re.match(rf"{sign}/?!? ?\w", lines[first + 1]):
            bad.append(f"{relative(path)}: no line after the SPDX line that says what lives here")
    assert not bad, faults(bad)


def test_root_folders_stay_bare() -> None:
    wrong = ("kernels/__init__.py", "retrieval/__init__.py", "conftest.py")
    assert [name for name in wrong if (ROOT / name).exists()] == []


def test_file_names_say_a_noun() -> None:
    assert [relative(path) for path in SOURCES if path.stem in RULES["vague_names"]] == []


def test_nothing_is_left_unfinished() -> None:
    texts = [*SOURCES, *ROOT.glob("*.md"), *files_under("docs", ".md"), *files_under("csrc", ".md"), ROOT / "Makefile"]
    bad = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not bad, faults(bad)
