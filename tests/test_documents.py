"""Documents and build files agree with the code: paths, links, versions, the map, dependencies."""

import importlib.metadata
import os
import re
import tomllib
from pathlib import Path

import pytest

import retinue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "retinue"
CODE_FOLDERS = ("src", "tests", "benchmarks")


def project() -> dict[str, object]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = content["project"]
    assert isinstance(found, dict)
    return found


def test_one_version() -> None:
    assert project()["version"] == retinue.__version__
    assert importlib.metadata.version("retinue") == retinue.__version__, "install it again"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{retinue.__version__}]" in changes


def texts() -> list[Path]:
    """What people read and write by hand: code, documents, build files."""
    top = [file for file in ROOT.iterdir() if file.is_file() and file.name != ".coverage"]
    below = [
        file
        for folder in (*CODE_FOLDERS, "docs", ".ci")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md", ".toml", ".yaml", ".yml", "") and file.is_file()
    ]
    return sorted(top) + sorted(below)


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    """No absolute path into somebody's folders, and none that leads out of the repository."""
    # Character classes keep these lines from finding themselves.
    foreign = re.compile(r"(?<![\w.:/~])/(?:hom[e]|roo[t]|tm[p]|wor[k])/|\.\./share[d]\b")
    wrong = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if foreign.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_build_files_name_no_host() -> None:
    """Where packages come from is set up in the user's installer, not here."""
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"://|index-url|find-links", text), name


def test_links_lead_somewhere() -> None:
    wrong = []
    for file in texts():
        if file.suffix != ".md":
            continue
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8"))
        inside = [link for link in links if "://" not in link]
        gone = [link for link in inside if not (file.parent / link).exists()]
        wrong += [f"{file.relative_to(ROOT)}: {link}" for link in gone]
    assert not wrong, "\n".join(wrong)


def test_the_map_shows_every_file() -> None:
    """ARCHITECTURE.md has one row a file, `| `folder/file.py` | what it is |`."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.MULTILINE)
    there = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py" or file.parent == PACKAGE
    }
    assert set(shown) == there, f"missing or gone: {sorted(set(shown) ^ there)}"
    assert len(shown) == len(there), "a file has two rows"


def test_every_dependency_has_its_reason() -> None:
    """docs/dependencies.md has one row a dependency, with the range of pyproject.toml."""
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `([^`]+)` \|", text, flags=re.MULTILINE))
    content = project()
    extras = content["optional-dependencies"]
    assert isinstance(extras, dict)
    wanted = [*content["dependencies"], *(item for group in extras.values() for item in group)]
    assert rows == dict(re.fullmatch(r"([\w-]+)(.*)", item).groups() for item in wanted)


@pytest.mark.skipif(os.name == "nt", reason="needs permission bits")
def test_ci_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and line[0] != "#"]
    assert lines[-1] == "make test"
