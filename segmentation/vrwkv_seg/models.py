"""Registration of backbones in mmseg."""

from mmseg.registry import MODELS

from vrwkv.backbones import VRWKV, ViT, ViTAdapter, VRWKVAdapter

for module in (VRWKV, VRWKVAdapter, ViT, ViTAdapter):
    MODELS.register_module(module=module)
