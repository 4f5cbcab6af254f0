"""A classifier in plain PyTorch: a backbone, an average over its map, and a head."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbones.vrwkv import VRWKV
from .backbones.vrwkv6 import VRWKV6
from .layers._checks import check_choice, check_int, check_rate
from .variants import VARIANTS
from .weights import load_classifier

try:
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError as error:
    if error.name != 'huggingface_hub':
        raise

    class PyTorchModelHubMixin:
        """Stand in for huggingface_hub's class: name the missing package."""

        def __init_subclass__(cls, **kwargs) -> None:
            super().__init_subclass__()

        @classmethod
        def from_pretrained(cls, *args, **kwargs) -> None:
            """Raise an error."""
            raise ImportError(
                'from_pretrained, save_pretrained and push_to_hub need the package '
                "'huggingface_hub', which is not installed: pip install huggingface_hub "
                'safetensors',
                name='huggingface_hub',
            )

        save_pretrained = push_to_hub = from_pretrained


FAMILIES = {'VRWKV': VRWKV, 'VRWKV6': VRWKV6}
POOLS = ('avg', 'max', 'avgmax', '')
OUTPUT_FORMATS = ('NCHW', 'NLC')

_MODEL_CARD = (
    """---
{{ card_data }}
---

# {{ config.family }} image classifier

{{ parameters }} parameters, {{ config.num_classes }} classes. The model is from
[Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like
Architectures](https://arxiv.org/abs/2403.02308).

```python
from vrwkv import VisionRWKV

model = VisionRWKV.from_pretrained('OWNER/NAME')        # the name of this repository
scores = model(images)                                  # images of shape (B, channels, H, W)
```

## Published accuracy

These figures are **the authors', for their own weights**. They say nothing about the weights
in this repository.

| model | image size | top-1 on ImageNet-1k | source |
|---|---|---|---|
"""
    + '\n'.join(
        f'| {name} | {variant.input_size} | {variant.top1} | {variant.source}, not measured here |'
        for name, variant in VARIANTS.items()
        if variant.top1 is not None
    )
    + '\n'
)


class Head(nn.Module):
    """A linear layer, or two with tanh between them, named as in mmpretrain's heads.

    ``fc`` in ``LinearClsHead``; ``layers.0.fc`` and ``layers.1.fc`` in ``StackedLinearClsHead``.

    Args:
        embed_dims: Channels of the features, C.
        num_classes: Number of classes; 0 for no last layer.
        hidden_dims: Channels of the hidden layer, or None for a single layer.
    """

    def __init__(self, embed_dims: int, num_classes: int, hidden_dims: int | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_dims or embed_dims
        #: The name of the last layer in this module.
        self.last_name = 'fc' if hidden_dims is None else 'layers.1.fc'
        if hidden_dims is None:
            self.fc = _linear(embed_dims, num_classes)
        else:
            widths = ((embed_dims, hidden_dims), (hidden_dims, num_classes))
            self.layers = nn.ModuleList(nn.ModuleDict({'fc': _linear(*pair)}) for pair in widths)

    @property
    def last(self) -> nn.Module:
        """The last layer, or the identity if there are no classes."""
        return self.get_submodule(self.last_name)

    def reset(self, num_classes: int) -> None:
        """Replace the last layer.

        Args:
            num_classes: Number of classes; 0 for no last layer.
        """
        owner, _, name = self.last_name.rpartition('.')
        self.get_submodule(owner).add_module(name, _linear(self.hidden_size, num_classes))

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the input of the last layer.

        Args:
            x: Features of shape ``(..., C)``.
        """
        return x if self.last_name == 'fc' else torch.tanh(self.layers[0]['fc'](x))

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores of shape ``(..., num_classes)``."""
        return self.last(self.hidden(x))


class VisionRWKV(
    nn.Module,
    PyTorchModelHubMixin,
    library_name='vrwkv',
    license='apache-2.0',
    pipeline_tag='image-classification',
    tags=['vision', 'rwkv'],
    model_card_template=_MODEL_CARD,
):
    """An image classifier with a VRWKV or VRWKV6 backbone.

    Scores and parameter names are those of mmpretrain's ``ImageClassifier``: ``backbone.*`` and
    ``head.fc.*``. The interface is timm's. Needs torch alone; :meth:`from_pretrained`,
    ``save_pretrained`` and ``push_to_hub`` need huggingface_hub and safetensors.

    Args:
        family: The class of the backbone, ``'VRWKV'`` or ``'VRWKV6'``.
        num_classes: Number of classes. With 0 there is no last layer: the output has the channels
            of the hidden layer, or C.
        hidden_dims: Channels of the hidden layer of an MLP head with tanh, as the released Large
            has it, or None for a linear head.
        global_pool: How the map becomes one vector: ``'avg'``, ``'max'``, ``'avgmax'`` (the mean
            of both), or ``''`` to keep the map.
        head_drop_rate: Dropout before the head, in [0, 1].
        **backbone: Arguments of :class:`~vrwkv.backbones.vrwkv.VRWKV` or
            :class:`~vrwkv.backbones.vrwkv6.VRWKV6`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        family: str = 'VRWKV',
        num_classes: int = 1000,
        hidden_dims: int | None = None,
        global_pool: str = 'avg',
        head_drop_rate: float = 0.0,
        **backbone,
    ) -> None:
        super().__init__()
        check_choice('family', family, tuple(FAMILIES))
        check_int('num_classes', num_classes, 0)
        check_choice('global_pool', global_pool, POOLS)
        check_rate('head_drop_rate', head_drop_rate)
        if 'out_indices' in backbone:
            raise ValueError(
                'a classifier uses the last layer only, but out_indices='
                f'{backbone["out_indices"]!r}: for maps of layers use features_only=True'
            )
        if hidden_dims is not None:
            check_int('hidden_dims', hidden_dims, 1)
        #: The arguments, as ``config.json`` has them.
        self.config: dict[str, Any] = dict(
            family=family,
            num_classes=num_classes,
            hidden_dims=hidden_dims,
            global_pool=global_pool,
            head_drop_rate=head_drop_rate,
            **backbone,
        )
        self.backbone = FAMILIES[family](**backbone)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.embed_dim = self.backbone.embed_dims
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = Head(self.num_features, num_classes, hidden_dims)
        #: The layers, as timm describes them.
        self.feature_info = [
            dict(
                module=f'backbone.layers.{index}',
                num_chs=self.num_features,
                reduction=self.backbone.patch_embed.patch_size,
            )
            for index in range(self.backbone.depth)
        ]

    @property
    def head_hidden_size(self) -> int:
        """Channels of the input of the last layer."""
        return self.head.hidden_size

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalised map of the last layer.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``.

        Returns:
            A map of shape ``(B, C, H // patch_size, W // patch_size)``.
        """
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and compute scores.

        Args:
            x: A map of shape ``(B, C, h, w)``.
            pre_logits: Whether to return the input of the last layer instead.

        Returns:
            Scores of shape ``(B, num_classes)``; with ``global_pool=''`` of shape
            ``(B, num_classes, h, w)``.
        """
        if self.global_pool == 'avg':
            x = x.mean((2, 3))
        elif self.global_pool == 'max':
            x = x.amax((2, 3))
        elif self.global_pool == 'avgmax':
            x = 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        else:
            x = x.permute(0, 2, 3, 1)
        x = self.head_drop(x)
        x = self.head.hidden(x) if pre_logits else self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``, of any size from one patch.

        Returns:
            Scores of shape ``(B, num_classes)``, before softmax.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their rank, channels or size do not fit.
        """
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Compute the outputs of some layers.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``.
            indices: The layers, from 0; negative ones count from the end. A number n stands for
                the last n layers, None for all.
            norm: Whether to apply the final norm layer to each output.
            stop_early: Whether to skip the layers behind the last one of ``indices``.
            output_fmt: ``'NCHW'`` for maps ``(B, C, h, w)``, ``'NLC'`` for tokens ``(B, h * w,
                C)``.
            intermediates_only: Whether to return the list alone.

        Returns:
            The result of :meth:`forward_features`, and the outputs in the order of the layers.

        Raises:
            ValueError: If there are no such layers, or no such format.
        """
        check_choice('output_fmt', output_fmt, OUTPUT_FORMATS)
        backbone = self.backbone
        taken = self._layer_indices(indices)
        normalise = backbone.ln1 or nn.Identity()
        x, resolution = backbone.embed(x)
        outputs = []
        for index, layer in enumerate(backbone.layers[: taken[-1] + 1 if stop_early else None]):
            x = layer(x, resolution)
            if index in taken:
                y = normalise(x) if norm else x
                outputs.append(backbone.to_map(y, resolution) if output_fmt == 'NCHW' else y)
        if intermediates_only:
            return outputs
        return backbone.to_map(normalise(x), resolution), outputs

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the parts that :meth:`forward_intermediates` does not need for some layers.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Whether to remove the final norm layer.
            prune_head: Whether to remove the head.

        Returns:
            The layers' indices from 0.
        """
        taken = self._layer_indices(indices)
        backbone = self.backbone
        backbone.depth = taken[-1] + 1
        backbone.layers = backbone.layers[: backbone.depth]
        backbone.out_indices = (taken[-1],)
        self.config['depth'] = backbone.depth
        if prune_norm:
            backbone.ln1 = None
            self.config['final_norm'] = False
        if prune_head:
            self.head = Head(self.num_features, 0)
            self.config['hidden_dims'] = None
            self.reset_classifier(0, '')
        return taken

    def _layer_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Turn indices in timm's form into ascending indices from 0."""
        depth = self.backbone.depth
        if indices is None:
            return list(range(depth))
        given = range(-indices, 0) if isinstance(indices, int) else indices
        if not given or not all(-depth <= index < depth for index in given):
            raise ValueError(
                f'the model has {depth} layers, so indices must be a number from 1 to {depth} or a '
                f'list of numbers in [{-depth}, {depth - 1}], got {indices!r}'
            )
        return sorted({index % depth for index in given})

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the head, or the identity if there is none."""
        return self.head.last

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer of the head by a new one with random weights.

        Args:
            num_classes: Number of classes. With 0 there is no last layer.
            global_pool: The new pooling, or None to keep it.

        Raises:
            ValueError: If there is no such pooling.
        """
        check_int('num_classes', num_classes, 0)
        if global_pool is not None:
            check_choice('global_pool', global_pool, POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.config.update(num_classes=num_classes, global_pool=self.global_pool)
        self.head.reset(num_classes)
        self.head.to(self.backbone.pos_embed).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass to save memory, or stop doing so."""
        for layer in self.backbone.layers:
            layer.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, beside those of one dimension."""
        return {'backbone.pos_embed'}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that group parameters for timm's layer-wise decay of learning rates."""
        return dict(
            stem=r'^backbone\.(?:pos_embed|patch_embed)',
            blocks=[(r'^backbone\.layers\.(\d+)', None), (r'^backbone\.ln1', (99999,))],
        )

    def load_pretrained(self, path: str | os.PathLike) -> None:
        """Load a checkpoint; see :func:`~vrwkv.weights.load_classifier`.

        Args:
            path: A ``torch.save`` or ``.safetensors`` file.

        Raises:
            CheckpointError: If the file cannot be read, or the weights do not fit.
        """
        from .checkpoint import read_checkpoint

        load_classifier(self, read_checkpoint(path, 'cpu')['state_dict'])

    # --- huggingface_hub ------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, config: dict | None = None, **kwargs
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card to a folder.

        Args:
            save_directory: The folder.
            config: Replaces the arguments of this model in ``config.json``.
            **kwargs: As for huggingface_hub's ``ModelHubMixin.save_pretrained``.
        """
        return super().save_pretrained(save_directory, config=config or self.config, **kwargs)

    def generate_model_card(self, *args, **kwargs) -> Any:
        """Return the model card of :meth:`save_pretrained`."""
        parameters = f'{sum(value.numel() for value in self.parameters()):,}'
        return super().generate_model_card(
            *args, config=self.config, parameters=parameters, **kwargs
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = 'cpu', **kwargs) -> VisionRWKV:
        """Build the model and load its weights, for ``from_pretrained``."""
        from huggingface_hub import hf_hub_download

        names = ('revision', 'cache_dir', 'force_download', 'local_files_only', 'token')
        names += ('proxies', 'resume_download')  # of huggingface_hub before 1.0
        source = {name: kwargs.pop(name) for name in names if name in kwargs}
        kwargs.pop('strict', None)  # the backbone's weights always have to fit
        model = cls(**kwargs)
        if os.path.isdir(model_id):
            path = Path(model_id, 'model.safetensors')
        else:
            path = hf_hub_download(model_id, 'model.safetensors', **source)
        model.load_pretrained(path)
        return model.to(map_location).eval()


def _linear(in_dims: int, out_dims: int) -> nn.Module:
    """Return a linear layer with mmpretrain's initial values, or the identity for no output."""
    if not out_dims:
        return nn.Identity()
    layer = nn.Linear(in_dims, out_dims)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
