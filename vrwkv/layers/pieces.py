"""Inference in pieces of tokens, so that its memory grows with the tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

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
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    *tensors: Tensor,
    shift: Callable[..., tuple[Tensor, ...]] | None = None,
    grid: tuple[int, int] | None = None,
    reach: int = 0,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Call a function of single tokens, after one of neighbours; in inference on pieces.

    The temporaries of both are then as large as a piece, which is a strip of the grid with the rows
    around it that the shift reads.

    Args:
        function: Maps tensors of shape ``(B, T, C)`` to a tensor or tensors ``(B, T, ...)``. A
            token of a result depends on that token of the arguments only.
        *tensors: Its arguments, or those of ``shift``.
        shift: Maps the tensors and their grid to the arguments of ``function``.
        grid: The grid ``(H, W)`` of the tokens. Any will do without a shift.
        reach: How many rows away a token may be on which a result of ``shift`` depends.
        out: Memory for the result of pieces, if its dtype fits; may be one of the arguments if
            ``reach`` is 0.

    Returns:
        What the function returns for all tokens.
    """
    batch, tokens = tensors[0].shape[:2]
    # Most images have few tokens. An int is not symbolic, so that this adds no guard to a graph.
    few = type(batch) is type(tokens) is int and batch * tokens <= min(CPU_TOKENS, GPU_TOKENS)
    size = None if few else piece_size(tensors[0])
    height, width = grid or (tokens, 1)
    # A wrong grid is left to the shift, which knows more about it.
    if size is None or batch * tokens <= size or height * width != tokens:
        return function(*(tensors if shift is None else shift(*tensors, grid)))
    # Wide images repeat little if a strip has four times the rows that it needs on each side.
    images, rows = max(1, size // tokens), max(1, 4 * reach, size // width)
    outs = None
    for first, top in product(range(0, batch, images), range(0, height, rows)):
        bottom = min(top + rows, height)
        start, stop = max(0, top - reach), min(height, bottom + reach)
        where = slice(first, first + images), slice(start * width, stop * width)
        piece = [x[where] for x in tensors]
        if shift is not None:
            own = slice((top - start) * width, (bottom - start) * width)
            piece = [x[:, own] for x in shift(*piece, (stop - start, width))]
        results = function(*piece)
        single = isinstance(results, Tensor)
        results = (results,) if single else results
        if outs is None:
            fits = out is not None and out.dtype == results[0].dtype
            outs = [out] if fits else [y.new_empty(batch, tokens, *y.shape[2:]) for y in results]
        for y, whole in zip(results, outs, strict=True):
            whole[first : first + images, top * width : bottom * width] = y
    return outs[0] if single else tuple(outs)
