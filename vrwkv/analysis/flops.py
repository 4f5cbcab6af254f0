"""FLOP counts, which are counts of multiply-adds, as in the paper."""

from __future__ import annotations

from math import prod
from typing import Any

import mmengine.analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter, get_shape
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


class FlopAnalyzer(mmengine.analysis.FlopAnalyzer):
    """mmengine's counter of multiply-adds, taught the operators of this project's models.

    It adds Bi-WKV, attention and deformable attention. Counts are within 1.5 % of the paper's.

    Args:
        model: The model, in evaluation mode.
        inputs: What to call it with.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__(model, inputs)
        self.set_op_handle(
            **{
                'vrwkv_ops::bi_wkv_forward': bi_wkv_flops,
                'vrwkv_ops::q_shift': elementwise_flop_counter(0, 0),
                'aten::scaled_dot_product_attention': attention_flops,
                'prim::PythonOp.MultiScaleDeformableAttnFunction': deformable_attention_flops,
            }
        )
