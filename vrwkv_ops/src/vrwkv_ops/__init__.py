"""Operators of Vision-RWKV: the Bi-WKV attention and the token shifts.

``bi_wkv``, ``token_shift``, ``q_shift``, ``squared_relu`` and ``sigmoid_gate`` run compiled kernels
where those were built and a vectorised pure-PyTorch path elsewhere. ``python -m vrwkv_ops`` tells
which, and why.
"""

from vrwkv_ops.ops import bi_wkv, q_shift, sigmoid_gate, squared_relu, token_shift

__version__ = '0.1.0'
__all__ = ['bi_wkv', 'q_shift', 'sigmoid_gate', 'squared_relu', 'token_shift']
