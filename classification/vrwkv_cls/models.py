"""Registration of the backbones in mmpretrain."""

from mmpretrain.registry import MODELS

import vrwkv.engine  # noqa: F401
from vrwkv.backbones import VRWKV

MODELS.register_module(module=VRWKV)
