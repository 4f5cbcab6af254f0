"""Registration of backbones and necks in mmdet."""

from mmdet.registry import MODELS

from vrwkv.backbones import VRWKV, ViT, ViTAdapter, VRWKVAdapter

from .simple_fpn import SimpleFPN

for module in (VRWKV, VRWKVAdapter, ViT, ViTAdapter, SimpleFPN):
    MODELS.register_module(module=module)
