"""Builds the kernels of `native/` into the package, where there is a compiler that can.

Without one the package is whole too: everything works on torch. `pyproject.toml` has the rest.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "libretinue.so"


def build_kernels(library: Path) -> None:
    """Compile; a failure is told, and kept for `why_not`, but is none of the installation's."""
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "native" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reason = library.with_suffix(".txt")
    reason.unlink(missing_ok=True)
    try:
        module.build(library)
    except module.BuildError as error:
        library.unlink(missing_ok=True)
        reason.write_text(str(error), encoding="utf-8")
        text = f"warning: without the fast kernels, which could not be built: {error}"
        print(text, file=sys.stderr, flush=True)


class BuildWithKernels(build_py):
    """The package's files, and the library beside them."""

    def run(self):
        super().run()
        folder = ROOT / "src" if self.editable_mode else Path(self.build_lib)
        build_kernels(folder / "retinue" / LIBRARY)


class WheelOfThisMachine(bdist_wheel):
    """For any Python, but not for any machine."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class MachineCode(Distribution):
    """Says that there is some, for the wheel's layout; setuptools sees only files of data."""

    def has_ext_modules(self):
        return True


commands = {"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisMachine}
setup(cmdclass=commands, distclass=MachineCode)
