"""The classifiers of the model index: their arguments and released weights, without mmengine."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Folder of the released weights on the Hugging Face Hub.
REPOSITORY = 'OpenGVLab/Vision-RWKV'
_PAPER = 'the paper'
_README = "upstream's README"


class Variant(NamedTuple):
    """A released classifier.

    Attributes:
        family: The class of the backbone, ``'VRWKV'`` or ``'VRWKV6'``.
        backbone: Arguments of the backbone.
        file: The released file in :data:`REPOSITORY`.
        top1: Top-1 accuracy on ImageNet-1k in percent, not measured here; None if it is unknown.
        source: The source of ``top1``.
        input_size: Side of the test images in pixels.
        crop: Side of the test images as a fraction of the resized image's shorter side.
        num_classes: Number of classes.
        hidden_dims: Channels of the hidden layer of an MLP head, or None for a linear head.
    """

    family: str
    backbone: dict[str, Any]
    file: str
    top1: float | None = None
    source: str = _PAPER
    input_size: int = 224
    crop: float = 0.875
    num_classes: int = 1000
    hidden_dims: int | None = None

    @property
    def url(self) -> str:
        """The address of the released file."""
        return f'https://huggingface.co/{REPOSITORY}/resolve/main/{self.file}'


_SMALL = dict(embed_dims=384, post_norm=True)
_BASE = dict(embed_dims=768, init_values=1e-5, post_norm=True)
_LARGE = dict(
    img_size=192, embed_dims=1024, depth=24, init_values=1e-5, post_norm=True, key_norm=True
)
#: The classifiers by their names in the model index.
VARIANTS = {
    'vrwkv-tiny_8xb128_in1k': Variant('VRWKV', dict(embed_dims=192), 'vrwkv_t_in1k_224.pth', 75.1),
    'vrwkv-small_8xb128_in1k': Variant(
        'VRWKV', _SMALL | dict(init_values=1), 'vrwkv_s_in1k_224.pth', 80.1
    ),
    'vrwkv-base_16xb64_in1k': Variant('VRWKV', _BASE, 'vrwkv_b_in1k_224.pth', 82.0),
    'vrwkv-large_32xb128-90e_in21k-192px': Variant(
        'VRWKV', _LARGE, 'vrwkv_l_in22k_192.pth',
        input_size=192, num_classes=21841, hidden_dims=3072,
    ),
    'vrwkv-large_in21k-pre_16xb64_in1k-384px': Variant(
        'VRWKV', _LARGE, 'vrwkv_l_22kto1k_384.pth', 86.0,
        input_size=384, crop=1.0, hidden_dims=3072,
    ),
    'vrwkv6-tiny_8xb128_in1k': Variant(
        'VRWKV6', dict(embed_dims=192, num_heads=3), 'vrwkv6_t_in1k_224.pth', 76.6, _README
    ),
    'vrwkv6-small_8xb128_in1k': Variant(
        'VRWKV6', _SMALL | dict(num_heads=6, init_values=1e-5),
        'vrwkv6_s_in1k_224.pth', 81.1, _README,
    ),
    'vrwkv6-base_16xb64_in1k': Variant(
        'VRWKV6', _BASE | dict(num_heads=12), 'vrwkv6_b_in1k_224.pth', 82.6, _README
    ),
}  # fmt: skip
#: The names without the recipe, each of the variant for ImageNet-1k.
SHORT_NAMES = {
    name.partition('_')[0]: name for name, variant in VARIANTS.items() if variant.top1 is not None
}
