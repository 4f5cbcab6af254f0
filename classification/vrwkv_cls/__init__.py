"""Vision-RWKV in mmpretrain: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)``.
"""

import warnings

from vrwkv._imports import explain_missing

with explain_missing(
    'vrwkv_cls', extra='classification', brings=('mmengine', 'mmpretrain', 'mmcv', 'torchvision')
):
    with warnings.catch_warnings():  # mmcv-lite warns of an operator that nothing here needs
        warnings.filterwarnings('ignore', 'Fail to import')
        import mmcv.cnn.bricks.transformer  # noqa: F401
    from mmpretrain.apis.model import ModelHub
    from mmpretrain.registry import MODELS

    from vrwkv.analysis import register_flop_handlers
    from vrwkv.backbones import VRWKV, VRWKV6
    from vrwkv.engine import patches
    from vrwkv.engine.model_index import index_folder

    from . import checks, mae  # noqa: F401

    for module in (VRWKV, VRWKV6):
        MODELS.register_module(module=module)
    patches.check_before_loading(checks.require_classes_fit)
    patches.keep_scope_of_mmpretrain()
    patches.check_images('mmpretrain')
    patches.suggest_model_names()
    folder = index_folder()
    ModelHub.register_model_index(folder / 'configs/classification/metafile.yml', folder)
    register_flop_handlers()
