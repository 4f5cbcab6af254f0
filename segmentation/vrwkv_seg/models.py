"""Registration of backbones in mmseg."""

from mmseg.registry import MODELS

from vrwkv.backbones import VRWKV, VRWKV6, ViT, ViTAdapter, VRWKV6Adapter, VRWKVAdapter

for module in (VRWKV, VRWKVAdapter, VRWKV6, VRWKV6Adapter, ViT, ViTAdapter):
    MODELS.register_module(module=module)
