"""Vision-RWKV in mmpretrain: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)``.
"""

from vrwkv._imports import explain_missing

with explain_missing('vrwkv_cls', extra='classification', brings=('mmpretrain', 'mmcv')):
    import vrwkv.engine  # noqa: F401 (safe checkpoint loading, onedl)
    from vrwkv.analysis import register_flop_handlers

    from . import checks, hub, mae, models  # noqa: F401

    hub.register_models()
    register_flop_handlers()
