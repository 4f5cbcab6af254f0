"""Registration of the backbones in mmpretrain."""

from mmpretrain.registry import MODELS

from vrwkv.backbones import VRWKV

MODELS.register_module(module=VRWKV)
