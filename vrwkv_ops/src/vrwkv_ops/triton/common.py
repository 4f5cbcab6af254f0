"""Functions that the Triton kernels of several operators share."""

import triton
import triton.language as tl


@triton.jit
def locate(T, C, tiles, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Find the part that this program computes, with 64-bit indices.

    Returns:
        Image and tile; the tile's rows r and their tokens t, both (BLOCK_T, 1); channels c
        (1, BLOCK_C); which of (t, c) exist.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    tile = program // blocks % tiles
    r = tl.arange(0, BLOCK_T)[:, None]
    t = tile * BLOCK_T + r
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return program // blocks // tiles, tile, r, t, c, (t < T) & (c < C)


@triton.jit
def store_sum(ptr, x, c, C):
    """Store the sum over all rows."""
    tl.store(ptr, tl.sum(x, axis=0, keep_dims=True), mask=c < C)
