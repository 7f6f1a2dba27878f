"""RecA: reconstruction alignment post-training for unified multimodal models.

The command line's work as functions: `reca.train(config)` and `reca.load(path)`. The kernels stand alone in
`reca.kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reca.recipes.api import load, train

__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    """Import torch and the models only when `train` or `load` is asked for."""
    if name in __all__:
        from reca.recipes import api

        return getattr(api, name)
    raise AttributeError(f"module 'reca' has no attribute {name!r}; it offers {', '.join(__all__)}")
