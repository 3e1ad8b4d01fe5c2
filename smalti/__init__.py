"""Smalti: visual tokenizers and the autoregressive generators that write images with their tokens.

The public API: `load`, `Tokenizer`, `Tokens`, `TokenSpec`, `Generator`, `Condition`, `__version__`. Importing it is
cheap: torch is imported when the first of these names is used.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.1.0"

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "tokenizers").is_dir():
    # In a checkout, tokenizers/, generators/, data/ and configs/ lie beside this folder; installed, inside. They have
    # no `__init__.py` (but configs/, where Hydra wants one), so that `import tokenizers` stays Hugging Face's package.
    __path__.append(str(_root))

_PUBLIC = {
    "load": "smalti.registry",
    "Tokenizer": "smalti.tokenizers.base",
    "Generator": "smalti.generators.base",
    "Condition": "smalti.generators.base",
    "Tokens": "smalti.tokenizers.spec",
    "TokenSpec": "smalti.tokenizers.spec",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> _Any:
    if name in _PUBLIC:
        return getattr(_import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")
