"""Operators of Vision-RWKV: the Bi-WKV attention and the token shifts.

``bi_wkv``, ``token_shift`` and ``q_shift`` run compiled kernels where those were built and a
vectorised pure-PyTorch path elsewhere. ``python -m vrwkv_ops`` tells which, and why.
"""

from vrwkv_ops.ops import bi_wkv, q_shift, token_shift

__version__ = '0.1.0'
__all__ = ['bi_wkv', 'q_shift', 'token_shift']
