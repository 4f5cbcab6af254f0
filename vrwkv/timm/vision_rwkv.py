"""The models in timm's registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from ..checkpoint import allow_harmless_globals, with_state_dict
from ..classifier import VisionRWKV
from ..layers import PatchEmbed, VRWKVLayer
from ..variants import REPOSITORY, VARIANTS, Variant
from ..weights import classifier_weights

# timm's names: the sizes, the patch, the image size, and a tag for the data of the weights.
_TAGS = {
    'vrwkv-large_32xb128-90e_in21k-192px': 'in22k',
    'vrwkv-large_in21k-pre_16xb64_in1k-384px': 'in22k_ft_in1k',
}
PATCH_SIZE = 16


def _timm_name(name: str, variant: Variant) -> str:
    size = name.partition('_')[0].replace('-', '_')
    return f'{size}_patch{PATCH_SIZE}_{variant.input_size}'


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> dict[str, Tensor]:
    """Give the weights of a checkpoint the names of a model.

    Args:
        state_dict: A checkpoint as upstream, mmpretrain or this project write it, or its weights.
        model: The model.
    """
    return classifier_weights(with_state_dict(state_dict, 'given to timm')['state_dict'])


def _cfg(variant: Variant) -> dict:
    last = 'head.fc' if variant.hidden_dims is None else 'head.layers.1.fc'
    return dict(
        hf_hub_id=REPOSITORY,
        hf_hub_filename=variant.file,
        num_classes=variant.num_classes,
        input_size=(3, variant.input_size, variant.input_size),
        pool_size=(variant.input_size // PATCH_SIZE,) * 2,
        crop_pct=variant.crop,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='backbone.patch_embed.projection',
        classifier=last,
        license='apache-2.0',
        paper_ids='arXiv:2403.02308',
        paper_name='Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like '
        'Architectures',
    )


def _build(
    in_chans: int = 3,
    drop_rate: float = 0.0,
    pos_drop_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> VisionRWKV:
    """Build a model from timm's names of the arguments."""
    model = VisionRWKV(
        in_channels=in_chans, head_drop_rate=drop_rate, drop_rate=pos_drop_rate, **kwargs
    )
    return model.to(device=device, dtype=dtype)


def _entrypoint(name: str, variant: Variant) -> Callable[..., nn.Module]:
    """Return timm's function for a model."""

    def build(pretrained: bool = False, **kwargs) -> nn.Module:
        hidden_dims = None if kwargs.get('num_classes') == 0 else variant.hidden_dims
        arguments = dict(family=variant.family, hidden_dims=hidden_dims, **variant.backbone)
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=3, feature_cls='getter'),
            **arguments | kwargs,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name}: see :class:`~vrwkv.VisionRWKV`."""
    return build


__all__ = ['checkpoint_filter_fn']
_ARCHITECTURES = {_timm_name(name, variant): variant for name, variant in VARIANTS.items()}
default_cfgs = generate_default_cfgs(
    {
        f'{_timm_name(name, variant)}.{_TAGS.get(name, "in1k")}': _cfg(variant)
        for name, variant in VARIANTS.items()
    }
)
allow_harmless_globals()  # in the released files
# For timm's tracing these are single steps: they check shapes.
register_notrace_module(PatchEmbed)
register_notrace_module(VRWKVLayer)
for _name, _variant in _ARCHITECTURES.items():
    globals()[_name] = register_model(_entrypoint(_name, _variant))
