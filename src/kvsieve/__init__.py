"""kvsieve: make the KV cache of a language model smaller while it runs.

recipe = kvsieve.recipe("g-kv", budget=1024)
with kvsieve.attach(model, recipe) as run:
    out = model.generate(**batch, max_new_tokens=4096)
print(run.report)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvsieve.compose import Recipe, recipe
from kvsieve.errors import KVSieveError

if TYPE_CHECKING:
    from kvsieve.engines.transformers import Cache, Run, attach
    from kvsieve.engines.transformers.calibrate import calibrate
    from kvsieve.report import Report

__version__ = "0.1.0"

# Imported on use, so that `import kvsieve` needs torch alone.
_LAZY = {
    "Cache": "kvsieve.engines.transformers",
    "Report": "kvsieve.report",
    "Run": "kvsieve.engines.transformers",
    "attach": "kvsieve.engines.transformers",
    "calibrate": "kvsieve.engines.transformers.calibrate",
}

__all__ = ["Cache", "KVSieveError", "Recipe", "Report", "Run", "attach", "calibrate", "recipe"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvsieve' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
