"""FLOP counts in multiply-adds, as in the paper; within 1.5 % of the paper's numbers.

:func:`complexity` counts a model. :func:`register_flop_handlers` lets mmengine's own analysis count
the operators of this project, too.
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

# Upstream's count per token and channel for Bi-WKV and its gate.
BI_WKV_FLOPS = 29
# mmengine's count per output value of grid_sample, with which mmcv samples on a CPU.
BILINEAR_FLOPS = 4


def bi_wkv_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count Bi-WKV and its gate, as upstream does.

    Args:
        inputs: Values of a traced ``vrwkv_ops::bi_wkv``.
        outputs: Not used.

    Returns:
        29 for each token and channel.
    """
    return BI_WKV_FLOPS * prod(get_shape(inputs[2]))


def bi_wkv6_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count Bi-WKV of VRWKV6 and the element-wise work of its layer, as upstream does.

    Args:
        inputs: Values of a traced ``vrwkv_ops::bi_wkv6_forward``.
        outputs: Not used.

    Returns:
        7 for each element of a state, N for each channel of heads of N, and 17 more.
    """
    return (7 * get_shape(inputs[4])[1] + 17) * prod(get_shape(inputs[0]))


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
    """Count the sampling of our operator and of mmcv's CUDA kernel like mmcv's PyTorch function.

    Args:
        inputs: Arguments of a traced ``vrwkv_ops::ms_deform_attn``, or tensors of a traced
            ``MultiScaleDeformableAttnFunction``: first the values, of shape ``(B, S, heads,
            C / heads)``, last the weights, of shape ``(B, T, heads, levels, points)``.
        outputs: Not used.

    Returns:
        4 for each sampled value.
    """
    return BILINEAR_FLOPS * prod(get_shape(inputs[-1])) * get_shape(inputs[0])[-1]


#: FLOP handlers by operator. Shifts and the mix of two tokens are elementwise; mmengine does not
#: count elementwise operators.
FLOP_HANDLERS: dict[str, Handle] = {
    'vrwkv_ops::bi_wkv': bi_wkv_flops,
    'vrwkv_ops::bi_wkv6_forward': bi_wkv6_flops,
    'vrwkv_ops::q_shift': elementwise_flop_counter(0, 0),
    'vrwkv_ops::token_shift': elementwise_flop_counter(0, 0),
    'vrwkv_ops::squared_relu': elementwise_flop_counter(0, 0),
    # Bi-WKV's count includes its gate; upstream does not count the gate of the channel mix.
    'vrwkv_ops::sigmoid_gate': elementwise_flop_counter(0, 0),
    'aten::scaled_dot_product_attention': attention_flops,
    'vrwkv_ops::ms_deform_attn': deformable_attention_flops,
    'prim::PythonOp.MultiScaleDeformableAttnFunction': deformable_attention_flops,
}
#: Activation handlers by operator: the number of output values.
ACTIVATION_HANDLERS: dict[str, Handle] = {
    'vrwkv_ops::bi_wkv': generic_activation_jit(),
    'vrwkv_ops::bi_wkv6_forward': generic_activation_jit(),
    'aten::scaled_dot_product_attention': generic_activation_jit(),
}


def register_flop_handlers() -> None:
    """Let mmengine's analysis count the operators of this project, in all models of this process.

    Its ``FlopAnalyzer``, ``ActivationAnalyzer`` and ``get_model_complexity_info`` then count them,
    and so do the ``get_flops.py`` of mmpretrain, mmdet and mmseg. ``vrwkv_cls``, ``vrwkv_det`` and
    ``vrwkv_seg`` call this function when they are imported.
    """
    # mmengine has no public registry: handlers are otherwise set on one analyzer at a time.
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(FLOP_HANDLERS)
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.update(ACTIVATION_HANDLERS)


class Complexity(NamedTuple):
    """Parameters and FLOPs of a model."""

    parameters: int  #: Of the whole model.
    flops: int  #: Of the whole model, in multiply-adds.
    backbone_parameters: int  #: Of its ``backbone``; of the whole model if it has none.
    backbone_flops: int  #: Likewise.
    operators: dict[str, int]  #: FLOPs of the whole model by operator, the largest first.


def complexity(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> Complexity:
    """Count parameters and FLOPs by tracing one forward pass.

    Args:
        model: The model. It is put into evaluation mode.
        inputs: Arguments of the model: images of shape ``(B, in_channels, H, W)`` for a backbone.

    Returns:
        The counts, for all images of the batch together.
    """
    model.eval()
    analyzer = FlopAnalyzer(model, inputs).set_op_handle(**FLOP_HANDLERS)
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
