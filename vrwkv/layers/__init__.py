"""The layers of the VRWKV models."""

from .drop_path import DropPath
from .mix import INIT_MODES, ChannelMix, SpatialMix
from .mix6 import SpatialMix6
from .patch_embed import PatchEmbed
from .position_embedding import resize_pos_embed
from .residual import ResidualLayer
from .token_shift import SHIFT_MODES, TokenShift
from .vrwkv_layer import VRWKVLayer, vrwkv_layer

__all__ = [
    'INIT_MODES',
    'SHIFT_MODES',
    'ChannelMix',
    'DropPath',
    'PatchEmbed',
    'ResidualLayer',
    'SpatialMix',
    'SpatialMix6',
    'TokenShift',
    'VRWKVLayer',
    'resize_pos_embed',
    'vrwkv_layer',
]
