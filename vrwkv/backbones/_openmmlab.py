"""The backbones that OpenMMLab's registries have: the plain ones with mmengine's ``init_cfg``."""

from .._base import BaseModule, WithInitCfg
from . import vit, vrwkv, vrwkv6


class VRWKV(WithInitCfg, vrwkv.VRWKV, BaseModule):
    """:class:`vrwkv.backbones.vrwkv.VRWKV` as a ``BaseModule``."""


class VRWKV6(WithInitCfg, vrwkv6.VRWKV6, BaseModule):
    """:class:`vrwkv.backbones.vrwkv6.VRWKV6` as a ``BaseModule``."""


class ViT(WithInitCfg, vit.ViT, BaseModule):
    """:class:`vrwkv.backbones.vit.ViT` as a ``BaseModule``."""
