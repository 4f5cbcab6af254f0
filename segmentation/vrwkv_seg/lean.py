"""UperNet for whole large images: inference with less memory and the results of mmseg's.

mmseg holds four maps of all channels at a quarter of the image's resolution, twice, and the logits
of all classes at the image's own, twice. These classes work in strips of rows and in groups of
classes. Training is mmseg's.
"""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.structures import PixelData
from mmseg.models.decode_heads import UPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

ROWS = 32  # of a strip, at a quarter of the image's resolution
CLASSES = 48  # of a group


@MODELS.register_module()
class LeanUPerHead(UPerHead):
    """mmseg's ``UPerHead``, in strips of rows where no gradient is needed.

    Use it in place of ``UPerHead``: arguments and weights are the same.
    """

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Compute logits.

        Args:
            inputs: Feature maps, from the finest on.

        Returns:
            Logits of shape ``(B, classes, H, W)``, the size of the finest map.
        """
        if torch.is_grad_enabled() or self.training or self.align_corners:
            return super().forward(inputs)
        inputs = self._transform_inputs(inputs)
        height, width = inputs[0].shape[2:]
        levels = [self.psp_forward(inputs)]
        for conv, x in zip(self.lateral_convs[:0:-1], inputs[-2:0:-1], strict=True):
            size = dict(size=x.shape[2:], mode='bilinear', align_corners=False)
            levels.insert(0, conv(x) + F.interpolate(levels[0], **size))
        # The path of the finest map ends in each strip. The others are wide, but not yet high.
        down = _widen(levels[0], width)
        outs = [conv(x) for conv, x in zip(self.fpn_convs[1:], levels[:-1], strict=True)]
        outs = [_widen(x, width) for x in (*outs, levels[-1])]
        smooth, fuse = map(_without_row_padding, (self.fpn_convs[0], self.fpn_bottleneck))
        logits = []
        for start in range(0, height, ROWS):
            stop = min(start + ROWS, height)
            # Two convolutions of 3 x 3 need a row more on each side. Outside the image it is zero.
            near, far = ((max(start - n, 0), min(stop + n, height)) for n in (1, 2))
            finest = self.lateral_convs[0](inputs[0][:, :, far[0] : far[1]])
            finest = smooth(_pad_rows(finest + _rows(down, height, *far), far, near))
            maps = [finest, *(_rows(x, height, *near) for x in outs)]
            maps = torch.cat([_pad_rows(x, near, (start, stop)) for x in maps], dim=1)
            logits.append(self.cls_seg(fuse(maps)))
        return torch.cat(logits, dim=2)


def _without_row_padding(module: ConvModule) -> ConvModule:
    """Return a convolution of 3 x 3 with the same weights that pads columns but no rows."""
    module, conv = copy(module), copy(module.conv)
    module._modules = {**module._modules, 'conv': conv}
    conv.padding = (0, conv.padding[1])
    return module


def _pad_rows(x: Tensor, given: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Add zeros for the rows next to ``wanted`` that are not among the rows ``given``."""
    above, below = given[0] - wanted[0] + 1, wanted[1] + 1 - given[1]
    return F.pad(x, (0, 0, above, below)) if above or below else x


def _widen(x: Tensor, width: int) -> Tensor:
    """Resize the width of a map."""
    return F.interpolate(x, size=(x.shape[2], width), mode='bilinear', align_corners=False)


def _rows(x: Tensor, height: int, start: int, stop: int) -> Tensor:
    """Return the rows from ``start`` to ``stop`` of a map whose height is resized to ``height``."""
    position = torch.arange(start, stop, device=x.device, dtype=torch.float32) + 0.5
    position = (position * (x.shape[2] / height) - 0.5).clamp(0, x.shape[2] - 1)
    first, last = int(position[0]), int(position[-1].ceil()) + 1
    # Each row is a mean of two. As a product of matrices it needs no memory but the result's.
    distance = position[:, None] - torch.arange(first, last, device=x.device)
    weights = (1 - distance.abs()).clamp(min=0).to(x.dtype)
    return torch.matmul(weights, x[:, :, first:last])


@MODELS.register_module()
class LeanEncoderDecoder(EncoderDecoder):
    """mmseg's ``EncoderDecoder``, whose results have no ``seg_logits``.

    Use it in place of ``EncoderDecoder`` with ``test_cfg=dict(mode='whole')``: classes are compared
    in groups. Arguments and weights are the same.
    """

    def predict(
        self, inputs: Tensor, data_samples: list[SegDataSample] | None = None
    ) -> list[SegDataSample]:
        """Predict label maps.

        Args:
            inputs: Images of shape ``(B, bands, H, W)``.
            data_samples: Their samples; None for samples of the images' own size.

        Returns:
            The samples, each with ``pred_sem_seg``. In other modes than ``'whole'``, with one
            class, without samples, or if the head has its own ``predict``: what mmseg returns.
        """
        own = type(self.decode_head).predict is not BaseDecodeHead.predict
        if own or self.test_cfg.mode != 'whole' or self.out_channels == 1 or data_samples is None:
            return super().predict(inputs, data_samples)
        metas = [sample.metainfo for sample in data_samples]
        logits = self.decode_head(self.extract_feat(inputs))
        best: list[tuple[Tensor, Tensor] | None] = [None] * len(metas)
        for start in range(0, logits.shape[1], CLASSES):
            group = logits[:, start : start + CLASSES]
            if group.shape[1] == 1:  # which would count as binary
                group, start = logits[:, start - 1 :], start - 1
            resized = self.decode_head.predict_by_feat(group, metas)
            samples = [SegDataSample(metainfo=meta) for meta in metas]
            for index, sample in enumerate(self.postprocess_result(resized, samples)):
                largest, label = sample.seg_logits.data.max(0)
                label += start
                if best[index] is not None:
                    before, old = best[index]
                    larger = largest > before
                    largest = torch.where(larger, largest, before)
                    label = torch.where(larger, label, old)
                best[index] = largest, label
            del resized, samples, sample
        for sample, (_, label) in zip(data_samples, best, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=label[None])))
        return data_samples
