"""Objects named on a command line: `pkg.module:name` or `file.py:name`.

Naming one runs the user's own code by design, so such names come from a command line or from Python, never from a file that is read.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from plasticity_probe.errors import UsageError

REFERENCE = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def is_reference(text: str) -> bool:
    """Whether a text has the form of a reference."""
    return REFERENCE.fullmatch(text) is not None


def resolve(reference: str) -> Any:
    """The callable that a reference names.

    Args:
        reference: "pkg.module:name", or "path/to/file.py:name".

    Raises:
        UsageError: No such module, file or callable, or importing it failed.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise UsageError(f"{reference!r} is no reference to a function: expected pkg.module:factory or file.py:factory")
    module, name = _import(match["module"]), match["name"]
    found = getattr(module, name, None)
    if not callable(found):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UsageError(f"{reference}: no function {name!r} there; found: {', '.join(public) or 'none'}")
    return found


def _import(module: str) -> ModuleType:
    try:
        return _import_file(Path(module).expanduser()) if module.endswith(".py") else importlib.import_module(module)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"importing {module} failed with {type(error).__name__}: {error}; for a file of your own write path/to/file.py:factory"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path.absolute()}")
    spec = importlib.util.spec_from_file_location(f"plasticity_probe_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and worker processes of a DataLoader look a class's module up by name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
