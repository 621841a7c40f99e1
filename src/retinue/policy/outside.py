"""A preset from outside the tree: `./my_policy.py:PRESET`, or `package.module:PRESET`.

The file is run as any Python is. Each is run once a process, so that two looks at a preset see the
same one.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from retinue.errors import UsageError
from retinue.policy.preset import Preset

FORM = "`./my_policy.py:PRESET`, or `package.module:PRESET`"


def outside(reference: str) -> Preset:
    """The preset that `reference` names. Raises UsageError where there is none, and says why."""
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"not a preset's place: `{reference}`", hint=f"write {FORM}")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found = getattr(module, name, None)
    if isinstance(found, Preset):
        return found
    there = [key for key, value in vars(module).items() if isinstance(value, Preset)]
    raise UsageError(
        f"`{place}` has no preset called `{name}`",
        hint=f"it has: {', '.join(there)}" if there else f"write `{name} = Preset(...)` there",
    )


def _file(path: Path) -> ModuleType:
    """The module in a file, run once; it is found again by its whole path."""
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise UsageError(f"no such file: `{path}`", hint=f"write {FORM}")
    name = f"retinue-outside:{whole}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        raise _broken(str(path), error) from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's own code raises
        raise _broken(name, error) from error


def _broken(place: str, error: Exception) -> UsageError:
    return UsageError(
        f"cannot load `{place}`: {type(error).__name__}: {error}",
        hint="try it with `python` alone; a module has to be importable, a file to end with .py",
    )
