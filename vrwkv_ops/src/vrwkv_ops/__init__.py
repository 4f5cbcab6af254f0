"""Operators of Vision-RWKV and its adapter: Bi-WKV, Bi-WKV6, token shifts, deformable attention.

They run compiled kernels if there are any, and vectorised PyTorch otherwise.
``python -m vrwkv_ops`` shows which, and why.
"""

import torch

if not hasattr(torch.library, 'register_fake'):
    raise ImportError(
        f'vrwkv_ops needs torch 2.4 or newer, and this is torch {torch.__version__}. '
        "Type: pip install --upgrade 'torch>=2.4'"
    )

from vrwkv_ops.decomposition import decompositions
from vrwkv_ops.ops import (
    bi_wkv,
    bi_wkv6,
    ms_deform_attn,
    q_shift,
    sigmoid_gate,
    squared_relu,
    token_shift,
)

__version__ = '0.1.0'
__all__ = [
    'bi_wkv',
    'bi_wkv6',
    'decompositions',
    'ms_deform_attn',
    'q_shift',
    'sigmoid_gate',
    'squared_relu',
    'token_shift',
]
