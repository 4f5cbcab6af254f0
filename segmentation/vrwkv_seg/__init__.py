"""Vision-RWKV in mmseg: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_seg'], allow_failed_imports=False)``.
"""

from vrwkv._imports import explain_missing
from vrwkv.mmcv_ops import serve_mmcv_ops

# mmseg imports ftfy and regex without declaring them.
with explain_missing(
    'vrwkv_seg', extra='segmentation', brings=('mmengine', 'mmseg', 'mmcv', 'ftfy', 'regex')
):
    serve_mmcv_ops()
    from mmseg.registry import MODELS

    from vrwkv.analysis import register_flop_handlers
    from vrwkv.backbones import VRWKV, VRWKV6, ViT, ViTAdapter, VRWKV6Adapter, VRWKVAdapter
    from vrwkv.engine import patches

    from . import datasets, hooks, lean, rasters  # noqa: F401

    for module in (VRWKV, VRWKVAdapter, VRWKV6, VRWKV6Adapter, ViT, ViTAdapter):
        MODELS.register_module(module=module)
    patches.keep_scope_of_mmseg()
    patches.check_images('mmseg')
    patches.normalise_any_number_of_bands()
    register_flop_handlers()
