"""Single modules of OpenRLHF, without its packages' `__init__` files.

Those import its models and trainers, and with them flash-attn, which a CPU does not have; the loss functions,
estimators and controllers need none of it.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def openrlhf_module(name: str) -> ModuleType:
    """The module `openrlhf.NAME`, such as "models.loss".

    `models.loss` and `models.utils` import deepspeed (seconds), the others next to nothing.
    """
    folder, _, module = name.rpartition(".")
    package = f"_openrlhf_{folder.replace('.', '_')}"
    if package not in sys.modules:
        spec = importlib.util.find_spec("openrlhf")
        assert spec is not None and spec.submodule_search_locations
        bare = ModuleType(package)
        bare.__path__ = [str(Path(spec.submodule_search_locations[0], *folder.split(".")))]
        sys.modules[package] = bare
    return importlib.import_module(f"{package}.{module}")
