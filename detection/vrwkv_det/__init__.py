"""Vision-RWKV in mmdet: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_det'], allow_failed_imports=False)``.
"""

from vrwkv._imports import explain_missing
from vrwkv.mmcv_ops import serve_mmcv_ops

with explain_missing('vrwkv_det', extra='detection', brings=('mmdet', 'mmcv')):
    serve_mmcv_ops()
    import vrwkv.engine  # noqa: F401 (safe checkpoint loading, onedl)
    from vrwkv.analysis import register_flop_handlers

    from . import datasets, models, precision  # noqa: F401

    register_flop_handlers()
