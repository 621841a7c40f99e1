"""How the library is built, found, refused, and what a sanitizer says of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kernels
from kernels import ISAS
from retinue.memory import native

DRIVER = Path(__file__).with_name("native_driver.cpp")
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(autouse=True)
def _forget() -> None:
    """What was loaded before is asked for again."""
    native.library.cache_clear()
    native._load.cache_clear()
    yield
    native.library.cache_clear()
    native._load.cache_clear()


def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINUE_NATIVE", "0")
    assert native.library() is None
    assert "RETINUE_NATIVE=0" in (native.why_not() or "")


def test_a_library_that_was_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libretinue.so")
    assert native.library() is None
    assert "compiler" in (native.why_not() or "")
    native._load.cache_clear()
    (tmp_path / "libretinue.txt").write_text("c++ some.cpp\nno such flag: -mfoo\n")
    assert "no such flag" in (native.why_not() or "")


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libretinue.so").write_text("something else")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libretinue.so")
    assert native.library() is None
    assert native.why_not()


def test_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = kernels.built()
    if library is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "LIBRARY", library)
    assert native.library() is not None
    assert native.why_not() is None
    native.library.cache_clear()
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.library() is None
    assert f"not {native.ABI}" in (native.why_not() or "")


def test_without_a_compiler_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builder = kernels.build_module()
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(builder.BuildError, match="no-such-compiler"):
        builder.build(tmp_path / "libretinue.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(builder.BuildError, match="false"):
        builder.build(tmp_path / "libretinue.so")
    assert not list(tmp_path.iterdir())


def sanitized(folder: Path) -> Path:
    """The driver and the library, built to notice what reads or writes beyond its memory."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    trial = [compiler, *SANITIZE, str(probe), "-o", str(folder / "probe")]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("the compiler has no sanitizers")
    library, driver = folder / "libretinue.so", folder / "driver"
    kernels.build_module().build(library, SANITIZE)
    command = [compiler, "-std=c++17", *SANITIZE, str(DRIVER), str(library)]
    command += [f"-Wl,-rpath,{folder}", "-o", str(driver)]
    subprocess.run(command, check=True)
    return driver


def test_clean_under_sanitizers(tmp_path: Path) -> None:
    driver = sanitized(tmp_path)
    ran = set()
    for isa in ISAS:
        environment = {**os.environ, "RETINUE_ISA": isa}
        done = subprocess.run(
            [driver], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr
        ran.add(done.stdout.strip())
    assert "portable" in ran
