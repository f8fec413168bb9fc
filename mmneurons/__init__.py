"""The multimodal neurons of a language model that reads images: find, decode, locate and ablate them.

`import mmneurons as mn` is quick: a name brings its module, and torch with it, when it is first used (PEP 562).
Which names there are, and in which modules, stands in `__init__.pyi`, where editors and type checkers read it too."""

__version__ = "0.1.0"

import ast
from importlib import import_module
from pathlib import Path

_MODULES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix('.pyi').read_text('utf-8')).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = [*_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    globals()[name] = found = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__():
    return sorted([*globals(), *__all__])
