"""What mmdet's heads need for channels-last and for bfloat16 maps; active on import.

* Memory format. mmcv's RoIAlign reads a map's memory as if it were contiguous, and so gives other
  features than the map's, without an error, where it is channels-last: which every convolution
  returns that got a channels-last map. The extractors of regions make maps contiguous first.
* bfloat16, the type of mixed precision on CPUs. Neither RoIAlign, nor non-maximum suppression, nor
  numpy knows it, and mmdet would round anchors and regions to it: near 1,000 pixels, bfloat16's
  numbers are 4 pixels apart. So regions are extracted, and predictions made of the heads' outputs,
  in float32. With float16, as on GPUs, nothing is different.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from torch import Tensor


def _widen(value: Any, devices: set[str]) -> Any:
    """Make float32 of the bfloat16 in lists and tuples, and note the devices that it was on."""
    if isinstance(value, (list, tuple)):
        return type(value)(_widen(item, devices) for item in value)
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        devices.add(value.device.type)
        return value.float()
    return value


def _in_float32(method: Callable) -> Callable:
    """Give a method float32 for bfloat16, and keep autocast from undoing that."""

    @wraps(method)
    def wrapper(self, *args, **kwargs) -> Any:
        devices: set[str] = set()
        args = _widen(args, devices)
        kwargs = {name: _widen(value, devices) for name, value in kwargs.items()}
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return method(self, *args, **kwargs)

    return wrapper


def _contiguous(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapper(self, feats: tuple[Tensor, ...], *args, **kwargs) -> Tensor:
        return forward(self, tuple(feat.contiguous() for feat in feats), *args, **kwargs)

    return wrapper


for _extractor in (SingleRoIExtractor, GenericRoIExtractor):
    _extractor.forward = _in_float32(_contiguous(_extractor.forward))
for _head in (BaseDenseHead, BBoxHead, FCNMaskHead):
    _head.predict_by_feat = _in_float32(_head.predict_by_feat)
