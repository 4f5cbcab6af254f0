"""Vision-RWKV in mmdet: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_det'], allow_failed_imports=False)``.
"""

from vrwkv._imports import explain_missing
from vrwkv.mmcv_ops import serve_mmcv_ops

with explain_missing('vrwkv_det', extra='detection', brings=('mmengine', 'mmdet', 'mmcv')):
    serve_mmcv_ops()
    from mmdet.registry import MODELS

    from vrwkv.analysis import register_flop_handlers
    from vrwkv.backbones import VRWKV, VRWKV6, ViT, ViTAdapter, VRWKV6Adapter, VRWKVAdapter
    from vrwkv.engine import patches

    from . import datasets  # noqa: F401
    from .simple_fpn import SimpleFPN

    for module in (VRWKV, VRWKVAdapter, VRWKV6, VRWKV6Adapter, ViT, ViTAdapter, SimpleFPN):
        MODELS.register_module(module=module)
    patches.skip_byte_order_marks_in_coco()
    patches.keep_scope_of_mmdet()
    patches.check_images('mmdet')
    patches.extract_regions_from_any_map()
    patches.predict_in_float32()
    register_flop_handlers()
