"""Vision-RWKV in mmpretrain: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)``.
"""

from vrwkv._imports import explain_missing

with explain_missing('vrwkv_cls', extra='classification', brings=('mmpretrain', 'mmcv')):
    from vrwkv.analysis import register_flop_handlers
    from vrwkv.engine import patches

    from . import checks, hub, mae, models  # noqa: F401

    patches.read_checkpoints_safely()
    patches.find_packages_without_pkg_resources()
    patches.prepare_configs_once()
    patches.skip_byte_order_marks()
    patches.check_before_loading(checks.require_classes_fit)
    patches.keep_scope_of_mmpretrain()
    patches.check_images_of_mmpretrain()
    patches.suggest_model_names()
    hub.register_models()
    register_flop_handlers()
