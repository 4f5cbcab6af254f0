"""The simple feature pyramid of ViTDet, for backbones with a single feature map."""

from __future__ import annotations

from collections.abc import Sequence

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map of shape ``(B, C, H, W)``."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SimpleFPN(BaseModule):
    """Compute four or more feature maps in parallel from one map at stride 16.

    Source: `Exploring Plain Vision Transformer Backbones for Object Detection
    <https://arxiv.org/abs/2203.16527>`_, section 3. Two, one and no transposed convolution of
    stride 2 and a max pooling give the strides 4, 8, 16 and 32. Each map then passes a 1 x 1 and a
    3 x 3 convolution with norm layers. Each further map has every second pixel of the previous one.

    Args:
        in_channels: Channels of the map, C, a multiple of 4.
        out_channels: Channels of each output map.
        num_outs: Number of maps, at least 4.
        norm_cfg: Config of the norm layers; None for layer norm over channels.
        act_cfg: Config of the activation after the two convolutions; None for none.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: If ``in_channels`` or ``num_outs`` is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if in_channels < 4 or in_channels % 4:
            raise ValueError(
                f'in_channels must be a multiple of 4, got {in_channels}: the map at stride 4 has '
                'a quarter of the channels'
            )
        if num_outs < 4:
            raise ValueError(f'num_outs must be at least 4, for strides 4 to 32, got {num_outs}')
        norm_cfg = norm_cfg or dict(type=LayerNorm2d)
        half, quarter = in_channels // 2, in_channels // 4
        self.num_outs = num_outs
        self.resizes = ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(in_channels, half, 2, stride=2),
                build_norm_layer(norm_cfg, half)[1],
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            nn.ConvTranspose2d(in_channels, half, 2, stride=2),
            nn.Identity(),
            nn.MaxPool2d(2),
        ])  # fmt: skip

        def convolution(channels: int, kernel: int) -> ConvModule:
            return ConvModule(
                channels,
                out_channels,
                kernel,
                padding=kernel // 2,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
            )

        widths = (quarter, half, in_channels, in_channels)
        self.lateral_convs = ModuleList(convolution(channels, 1) for channels in widths)
        self.fpn_convs = ModuleList(convolution(out_channels, 3) for _ in widths)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid.

        Args:
            inputs: One map of shape ``(B, C, H, W)`` at stride 16.

        Returns:
            ``num_outs`` maps of ``out_channels`` channels at the strides 4, 8, 16, 32, ...

        Raises:
            ValueError: If there is not exactly one map.
        """
        if len(inputs) != 1:
            raise ValueError(
                f'SimpleFPN takes one map, got {len(inputs)}: give the backbone one of out_indices,'
                " or use mmdet's FPN for a backbone with several"
            )
        outs = [
            fpn_conv(lateral_conv(resize(inputs[0])))
            for resize, lateral_conv, fpn_conv in zip(
                self.resizes, self.lateral_convs, self.fpn_convs, strict=True
            )
        ]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
