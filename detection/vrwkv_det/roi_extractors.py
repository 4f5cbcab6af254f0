"""What mmdet's region-of-interest extractors need for mmcv's RoIAlign; active on import.

* Memory format. RoIAlign reads a map's memory as if it were contiguous, and so gives other features
  than the map's, without an error, where it is channels-last: which every convolution returns that
  got a channels-last map.
* bfloat16, the type of mixed precision on CPUs. RoIAlign does not know it, and mmdet would round
  the regions to the features' type: near 1,000 pixels, bfloat16's numbers are 4 pixels apart. So
  the extractors work in float32 on such features. With float16 they are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from torch import Tensor


def _prepare(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapper(self, feats: Sequence[Tensor], rois: Tensor, *args, **kwargs) -> Tensor:
        feats = tuple(feat.contiguous() for feat in feats)
        if feats[0].dtype != torch.bfloat16:
            return forward(self, feats, rois, *args, **kwargs)
        with torch.autocast(rois.device.type, enabled=False):
            return forward(self, tuple(feat.float() for feat in feats), rois, *args, **kwargs)

    return wrapper


for extractor in (SingleRoIExtractor, GenericRoIExtractor):
    extractor.forward = _prepare(extractor.forward)
