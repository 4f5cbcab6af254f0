"""The paper's ViT baseline for detection and segmentation."""

from ._openmmlab import ViT
from .vrwkv_adapter import AdapterMixin


class ViTAdapter(AdapterMixin, ViT):
    """A plain ViT with a ViT-Adapter, the baseline of the paper's tables 3 and 4.

    It takes the arguments of :class:`~vrwkv.backbones.vrwkv_adapter.AdapterMixin` and of
    :class:`~vrwkv.backbones.ViT`, all by name, but not ``final_norm``, and returns maps at strides
    4, 8, 16 and 32.
    """
