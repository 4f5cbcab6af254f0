"""Inference in pieces of tokens, so that its memory grows with the tokens alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Tokens of a piece: few enough for a CPU's caches. A GPU needs more to be busy.
CPU_TOKENS, GPU_TOKENS = 2048, 65536


def piece_size(x: Tensor) -> int | None:
    """Return the number of tokens that inference handles at once.

    Args:
        x: A tensor on the device of the computation.

    Returns:
        The number; None in training, and while PyTorch compiles, exports or traces: then all tokens
        are one piece.
    """
    if torch.is_grad_enabled() or is_traced(x):
        return None
    return CPU_TOKENS if x.device.type == 'cpu' else GPU_TOKENS


def is_traced(x: Tensor) -> bool:
    """Return whether PyTorch compiles, exports or traces a computation."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)


def in_pieces(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Call a function of single tokens; in inference on pieces of tokens.

    The temporaries of the function are then as large as a piece.

    Args:
        function: Maps tensors of shape ``(B, T, C)`` to a tensor or tensors ``(B, T, ...)``. A
            token of a result depends on that token of the arguments only.
        *tensors: Its arguments.

    Returns:
        What the function returns for all tokens.
    """
    batch, tokens = tensors[0].shape[:2]
    size = piece_size(tensors[0])
    if size is None or batch * tokens <= size:
        return function(*tensors)
    pieces = zip(*(x.flatten(0, 1).unsqueeze(0).split(size, dim=1) for x in tensors), strict=True)
    start, outs = 0, None
    for piece in pieces:
        results = function(*piece)
        single = isinstance(results, Tensor)
        results = (results,) if single else results
        if outs is None:
            outs = [y.new_empty(1, batch * tokens, *y.shape[2:]) for y in results]
        for out, y in zip(outs, results, strict=True):
            out[:, start : start + y.shape[1]] = y
        start += piece[0].shape[1]
    outs = [out.view(batch, tokens, *out.shape[2:]) for out in outs]
    return outs[0] if single else tuple(outs)
