"""Vision-RWKV in timm: importing this module registers the models there.

``timm.create_model('vrwkv_tiny_patch16_224', pretrained=True)`` works afterwards, and
``python -m vrwkv.timm train.py ...`` runs a script of timm with the models registered. A model is a
:class:`~vrwkv.VisionRWKV`. TorchScript is not supported.
"""

from __future__ import annotations

#: The first release of timm with everything that this module calls.
OLDEST_TIMM = (1, 0)

try:
    import timm
except ModuleNotFoundError as error:
    if error.name != 'timm':
        raise
    raise ImportError(
        'vrwkv.timm needs the package timm, which is not installed: pip install timm', name='timm'
    ) from error
if tuple(map(int, timm.__version__.split('.')[:2])) < OLDEST_TIMM:
    raise ImportError(
        f'vrwkv.timm needs timm {".".join(map(str, OLDEST_TIMM))} or newer, but timm '
        f'{timm.__version__} is installed: pip install --upgrade timm',
        name='timm',
    )

from .vision_rwkv import checkpoint_filter_fn  # noqa: E402

__all__ = ['checkpoint_filter_fn']
