"""Vision-RWKV models: the backbones and their layers, each defined once."""

from importlib import import_module

__version__ = '0.1.0'
__all__ = ['VisionRWKV', 'create_model', 'list_models']

_MODULES = {'VisionRWKV': 'classifier', 'create_model': 'factory', 'list_models': 'factory'}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
