"""The backbones.

The adapters need mmcv, so they are imported at their first use.
"""

from importlib import import_module

from .vit import ViT
from .vrwkv import VRWKV
from .vrwkv6 import VRWKV6

# A star import must work without mmcv, so the adapters are not in it.
__all__ = ['VRWKV', 'VRWKV6', 'ViT']

_LAZY = {
    'AdapterMixin': 'vrwkv_adapter',
    'VRWKV6Adapter': 'vrwkv_adapter',
    'VRWKVAdapter': 'vrwkv_adapter',
    'ViTAdapter': 'vit_adapter',
}


def __getattr__(name: str) -> type:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_LAZY[name]}', __name__), name)
