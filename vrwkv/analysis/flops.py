"""FLOP counts, which are counts of multiply-adds, as in the paper.

Importing this module, which :mod:`vrwkv.backbones` does, teaches mmengine's analysis the operators
of this project's models: its ``FlopAnalyzer`` and ``get_model_complexity_info``, and the
``get_flops.py`` of mmpretrain, mmdet and mmseg, then count them. Counts are within 1.5 % of the
paper's.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from mmengine.analysis import FlopAnalyzer, complexity_analysis, parameter_count
from mmengine.analysis.jit_handles import (
    Handle,
    elementwise_flop_counter,
    generic_activation_jit,
    get_shape,
)
from torch import Tensor, nn

# What upstream counts per token and channel for Bi-WKV and its gate.
BI_WKV_FLOPS = 29
# What mmengine counts per value that grid_sample returns, which mmcv samples with on a CPU.
BILINEAR_FLOPS = 4


def bi_wkv_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count Bi-WKV and its gate, as upstream does.

    Args:
        inputs: Values of a traced ``vrwkv_ops::bi_wkv_forward``.
        outputs: Not used.

    Returns:
        29 for each token and channel.
    """
    return BI_WKV_FLOPS * prod(get_shape(inputs[2]))


def attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count both matrix products of an attention.

    Args:
        inputs: Values of a traced ``aten::scaled_dot_product_attention``.
        outputs: Not used.

    Returns:
        The number of multiply-adds.
    """
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def deformable_attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the sampling of mmcv's kernel for GPUs as its PyTorch path for CPUs is counted.

    Args:
        inputs: Tensors of a traced ``MultiScaleDeformableAttnFunction``: values of shape ``(B, S,
            heads, C / heads)``, two shapes, points and weights of shape ``(B, T, heads, levels,
            points)``.
        outputs: Not used.

    Returns:
        4 for each sampled value.
    """
    return BILINEAR_FLOPS * prod(get_shape(inputs[4])) * get_shape(inputs[0])[-1]


#: FLOP handlers by operator. Shifts and the mix of two tokens are elementwise, which mmengine does
#: not count anywhere.
FLOP_HANDLERS: dict[str, Handle] = {
    'vrwkv_ops::bi_wkv_forward': bi_wkv_flops,
    'vrwkv_ops::q_shift': elementwise_flop_counter(0, 0),
    'vrwkv_ops::token_shift': elementwise_flop_counter(0, 0),
    'vrwkv_ops::squared_relu': elementwise_flop_counter(0, 0),
    # Bi-WKV's count has its gate in it; upstream does not count that of the channel mix.
    'vrwkv_ops::sigmoid_gate': elementwise_flop_counter(0, 0),
    'aten::scaled_dot_product_attention': attention_flops,
    'prim::PythonOp.MultiScaleDeformableAttnFunction': deformable_attention_flops,
}
#: Handlers that count the results of products and of what stands for them.
ACTIVATION_HANDLERS: dict[str, Handle] = {
    'vrwkv_ops::bi_wkv_forward': generic_activation_jit(),
    'aten::scaled_dot_product_attention': generic_activation_jit(),
}
# mmengine has no public registry, only a handler at a time on an analyzer that one made oneself.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(FLOP_HANDLERS)
complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.update(ACTIVATION_HANDLERS)


class Complexity(NamedTuple):
    """What a model costs."""

    parameters: int  #: Of the whole model.
    flops: int  #: Of the whole model, in multiply-adds.
    backbone_parameters: int  #: Of its ``backbone``, or of all where it has none.
    backbone_flops: int  #: Likewise.
    operators: dict[str, int]  #: FLOPs of the whole model by operator, the largest first.


def complexity(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> Complexity:
    """Count parameters and FLOPs of one forward pass.

    The pass is run, and traced, once.

    Args:
        model: The model. It is put into evaluation mode.
        inputs: What to call it with: images of shape ``(B, 3, H, W)`` for a backbone.

    Returns:
        The counts, for all images of the batch together.
    """
    model.eval()
    analyzer = FlopAnalyzer(model, inputs)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        operators = dict(analyzer.by_operator().most_common())
    parameters = parameter_count(model)
    backbone = 'backbone' if isinstance(getattr(model, 'backbone', None), nn.Module) else ''
    return Complexity(
        parameters[''],
        int(analyzer.total()),
        parameters[backbone],
        int(analyzer.total(backbone)),
        operators,
    )
