"""Registration of the backbones in mmpretrain."""

from mmpretrain.registry import MODELS

from vrwkv.backbones import VRWKV, VRWKV6

for module in (VRWKV, VRWKV6):
    MODELS.register_module(module=module)
