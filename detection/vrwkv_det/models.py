"""Registration of backbones and necks in mmdet."""

from mmdet.registry import MODELS

from vrwkv.backbones import VRWKV, VRWKV6, ViT, ViTAdapter, VRWKV6Adapter, VRWKVAdapter

from .simple_fpn import SimpleFPN

for module in (VRWKV, VRWKVAdapter, VRWKV6, VRWKV6Adapter, ViT, ViTAdapter, SimpleFPN):
    MODELS.register_module(module=module)
