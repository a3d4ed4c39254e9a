"""Import single modules of OpenRLHF, without its packages' `__init__` files.

The `__init__` files import flash-attn, which needs CUDA. The modules with the losses and estimators do not need it.
They do not need deepspeed either, which takes seconds to import, so a process without it gets an empty module.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def openrlhf_module(name: str) -> ModuleType:
    """The module `openrlhf.NAME`, such as "models.loss"."""
    folder, _, module = name.rpartition(".")
    package = f"_openrlhf_{folder.replace('.', '_')}"
    if package not in sys.modules:
        spec = importlib.util.find_spec("openrlhf")
        assert spec is not None and spec.submodule_search_locations
        bare = ModuleType(package)
        bare.__path__ = [str(Path(spec.submodule_search_locations[0], *folder.split(".")))]
        sys.modules[package] = bare
    with _deepspeed_left_out():
        return importlib.import_module(f"{package}.{module}")


@contextmanager
def _deepspeed_left_out() -> Iterator[None]:
    """Let a module import an empty `deepspeed`, unless the real one is loaded. The modules do not use it."""
    if sys.modules.get("deepspeed") is not None:
        yield
        return
    is_blocked = "deepspeed" in sys.modules  # None there makes an import of it fail
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    try:
        yield
    finally:
        del sys.modules["deepspeed"]
        if is_blocked:
            sys.modules["deepspeed"] = None  # type: ignore[assignment]
