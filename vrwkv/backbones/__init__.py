"""The backbones, as OpenMMLab's registries have them.

``VRWKV``, ``VRWKV6`` and ``ViT`` need torch and ``vrwkv_ops``; mmengine's ``BaseModule`` is among
their bases where mmengine is installed. The adapters need mmcv. Everything is imported at its
first use. The submodules ``vrwkv``, ``vrwkv6`` and ``vit`` define the plain classes.
"""

from importlib import import_module

# A star import must work without mmcv, so the adapters are not in it.
__all__ = ['VRWKV', 'VRWKV6', 'ViT']

_MODULES = {
    **dict.fromkeys(__all__, '_openmmlab'),
    'AdapterMixin': 'vrwkv_adapter',
    'VRWKV6Adapter': 'vrwkv_adapter',
    'VRWKVAdapter': 'vrwkv_adapter',
    'ViTAdapter': 'vrwkv_adapter',
}


def __getattr__(name: str) -> type:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)
