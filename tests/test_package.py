"""The wheel, as a user gets it: data and licences are inside, and it works without the sources."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import retinue

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py", "MANIFEST.in")
SETUPTOOLS = 77  # the first that reads `license = "..."` as pyproject.toml has it


def missing_tool() -> str:
    """Why a wheel cannot be built here, or nothing."""
    if importlib.util.find_spec("pip") is None:
        return "no pip"
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "no setuptools"
    too_old = int(version.partition(".")[0]) < SETUPTOOLS
    return f"setuptools {version} is older than {SETUPTOOLS}" if too_old else ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy, so that no old `build/` and no new one gets in the way."""
    if reason := missing_tool():
        print(f"\nTHE WHEEL WAS NOT TESTED: {reason}", file=sys.__stderr__, flush=True)
        pytest.skip(f"the wheel was not tested: {reason}")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT / "src", copy / "src", ignore=junk)
    shutil.copytree(ROOT / "native", copy / "native", ignore=junk)
    for name in NEEDED:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel would install."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(code: str, installed: Path) -> str:
    """What `code` prints where the wheel comes before everything else, the sources included."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_name_and_version(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"retinue-{retinue.__version__}-py3-none-{platform}.whl"


def test_holds_the_package_and_nothing_else(installed: Path) -> None:
    tops = {entry.name for entry in installed.iterdir()}
    assert tops == {"retinue", f"retinue-{retinue.__version__}.dist-info"}
    sources = ROOT / "src" / "retinue"
    there = {f.relative_to(sources) for f in sources.rglob("*") if f.is_file()}
    there = {file for file in there if "__pycache__" not in file.parts and file.suffix != ".so"}
    if shutil.which(os.environ.get("CXX", "c++")):
        there.add(Path("libretinue.so"))
    package = installed / "retinue"
    assert {f.relative_to(package) for f in package.rglob("*") if f.is_file()} == there


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "data/sample-tasks.jsonl",
        "data/sample/config.json",
        "data/sample/model.safetensors",
        "data/sample/tokenizer.json",
        "data/sample/chat_template.jinja",
    ],
)
def test_data_is_inside_and_unchanged(name: str, installed: Path) -> None:
    def digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    assert digest(installed / "retinue" / name) == digest(ROOT / "src" / "retinue" / name)


def test_entry_point_and_licences(installed: Path) -> None:
    (found,) = importlib.metadata.distributions(name="retinue", path=[str(installed)])
    (script,) = found.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("retinue", "retinue.cli.main:main")
    assert found.metadata["License-Expression"] == "Apache-2.0"
    licences = installed / f"retinue-{retinue.__version__}.dist-info" / "licenses"
    assert {file.name for file in licences.iterdir()} == {"LICENSE", "NOTICE"}


def test_imports_from_the_wheel(installed: Path) -> None:
    assert Path(run("import retinue; print(retinue.__file__)", installed)).is_relative_to(installed)


def test_finds_its_sample_in_the_wheel(installed: Path) -> None:
    code = "from retinue.memory.home import locate; print(locate('sample'))"
    sample = Path(run(code, installed))
    assert sample.is_relative_to(installed)
    assert (sample / "model.safetensors").is_file()


def test_command_line_runs_from_the_wheel(installed: Path) -> None:
    code = "import sys; from retinue.cli.main import main; sys.exit(main(['--version']))"
    assert run(code, installed) == f"retinue {retinue.__version__}"
