"""Bi-WKV6 in Triton: one program for the states of a head, token after token.

Inputs that are not contiguous are copied. Decays come as factors of one step, computed by PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import accumulation_dtype, check_bi_wkv6
from vrwkv_ops.wkv6 import LARGE

_COLUMNS = 16  # value channels of a program in the forward pass
_CHUNK = 16  # the backward pass computes the states of so many tokens at a time


@triton.jit
def _read(ptr, at, i, exists, ACC: tl.constexpr):
    return tl.load(ptr + at + i, mask=exists, other=0.0).to(ACC)


@triton.jit
def forward_kernel(
    r_ptr, k_ptr, v_ptr, d_ptr, u_ptr, y_ptr, T, H, N,
    CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute y of one head for BLOCK_V value channels, in the accumulation dtype, u's."""
    ACC: tl.constexpr = u_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(N, BLOCK_V)
    head = program // blocks % H
    step = tl.cast(N, tl.int64) * H  # an image may have 2^31 elements
    first = program // blocks // H * T * step + head * N
    i = tl.arange(0, BLOCK_N)
    j = program % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    u = _read(u_ptr, head * N, i, i < N, ACC)
    state = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    for t in range(T):
        at = first + t * step
        r = _read(r_ptr, at, i, i < N, ACC)
        k = _read(k_ptr, at, i, i < N, ACC)
        v = _read(v_ptr, at, j, j < N, ACC)
        d = _read(d_ptr, at, i, i < N, ACC)
        y = tl.sum(r[:, None] * (state + (u * k)[:, None] * v[None, :]), axis=0)
        tl.store(y_ptr + at + j, y, mask=j < N)
        state = d[:, None] * state + k[:, None] * v[None, :]
    if not CAUSAL:
        tl.debug_barrier()  # y is read again
        state = tl.zeros((BLOCK_N, BLOCK_V), ACC)
        for s in range(T):
            at = first + (T - 1 - s) * step
            r = _read(r_ptr, at, i, i < N, ACC)
            k = _read(k_ptr, at, i, i < N, ACC)
            v = _read(v_ptr, at, j, j < N, ACC)
            d = _read(d_ptr, at, i, i < N, ACC)
            y = _read(y_ptr, at, j, j < N, ACC) + tl.sum(r[:, None] * state, axis=0)
            tl.store(y_ptr + at + j, y, mask=j < N)
            state = d[:, None] * state + k[:, None] * v[None, :]


@triton.jit
def backward_kernel(
    gy_ptr, r_ptr, k_ptr, v_ptr, d_ptr, u_ptr, gr_ptr, gk_ptr, gv_ptr, gd_ptr, gu_ptr,
    edges_ptr, states_ptr, T, H, N, chunks,
    REVERSE: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute one head's gradients of one direction; the reverse one adds its own.

    ``gd`` is the gradient of the decays, from states times adjoint states.
    """
    ACC: tl.constexpr = u_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    head = program % H
    step = tl.cast(N, tl.int64) * H
    first = program // H * T * step + head * N
    if REVERSE:
        first += (T - 1) * step
        step = -step
    i = tl.arange(0, BLOCK_N)
    inside = i < N
    cell = i[:, None] * BLOCK_N + i[None, :]
    size = tl.cast(BLOCK_N * BLOCK_N, tl.int64)
    edges = edges_ptr + program * chunks * size + cell
    states = states_ptr + program * CHUNK * size + cell
    state = tl.zeros((BLOCK_N, BLOCK_N), ACC)
    for chunk in range(chunks):
        tl.store(edges + chunk * size, state)
        for n in range(CHUNK):
            s = chunk * CHUNK + n
            at, exists = first + s * step, inside & (s < T)
            k = _read(k_ptr, at, i, exists, ACC)
            v = _read(v_ptr, at, i, exists, ACC)
            d = _read(d_ptr, at, i, exists, ACC)
            state = d[:, None] * state + k[:, None] * v[None, :]
    u = _read(u_ptr, head * N, i, inside, ACC)
    gu = tl.zeros((BLOCK_N,), ACC)
    adjoint = tl.zeros((BLOCK_N, BLOCK_N), ACC)
    for back in range(chunks):
        chunk = chunks - 1 - back
        tl.debug_barrier()  # states are read again
        state = tl.load(edges + chunk * size)
        for n in range(CHUNK):
            s = chunk * CHUNK + n
            at, exists = first + s * step, inside & (s < T)
            tl.store(states + n * size, state)
            k = _read(k_ptr, at, i, exists, ACC)
            v = _read(v_ptr, at, i, exists, ACC)
            d = _read(d_ptr, at, i, exists, ACC)
            state = d[:, None] * state + k[:, None] * v[None, :]
        tl.debug_barrier()
        for n in range(CHUNK):
            s = chunk * CHUNK + CHUNK - 1 - n
            at, exists = first + s * step, inside & (s < T)
            before = tl.load(states + (CHUNK - 1 - n) * size)
            g = _read(gy_ptr, at, i, exists, ACC)
            r = _read(r_ptr, at, i, exists, ACC)
            k = _read(k_ptr, at, i, exists, ACC)
            v = _read(v_ptr, at, i, exists, ACC)
            d = _read(d_ptr, at, i, exists, ACC)
            gr = tl.sum(before * g[None, :], axis=1)
            gk = tl.sum(adjoint * v[None, :], axis=1)
            gv = tl.sum(adjoint * k[:, None], axis=0)
            gd = tl.sum(before * adjoint, axis=1)
            if REVERSE:
                gr += _read(gr_ptr, at, i, exists, ACC)
                gk += _read(gk_ptr, at, i, exists, ACC)
                gv += _read(gv_ptr, at, i, exists, ACC)
                gd += _read(gd_ptr, at, i, exists, ACC)
            else:
                own = tl.sum(v * g, axis=0)
                gr += own * u * k
                gk += own * u * r
                gv += tl.sum(r * u * k, axis=0) * g
                gu += own * r * k
            tl.store(gr_ptr + at + i, gr, mask=exists)
            tl.store(gk_ptr + at + i, gk, mask=exists)
            tl.store(gv_ptr + at + i, gv, mask=exists)
            tl.store(gd_ptr + at + i, gd, mask=exists)
            adjoint = d[:, None] * adjoint + r[:, None] * g[None, :]
    if not REVERSE:
        tl.store(gu_ptr + program * N + i, gu, mask=inside)


def _check(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool, gy: Tensor | None = None
) -> None:
    """Check direct calls through torch.ops, which could read out of bounds."""
    check_bi_wkv6(r, k, v, w, u, causal)
    acc = accumulation_dtype(v.dtype)
    if (w.dtype, u.dtype) != (acc, acc):
        raise RuntimeError(f'bi_wkv6: expected w and u of {acc}, got {w.dtype} and {u.dtype}')
    if gy is not None and (gy.shape, gy.dtype, gy.device) != (v.shape, v.dtype, v.device):
        raise RuntimeError(
            f'bi_wkv6_backward: expected gy of shape {tuple(v.shape)}, {v.dtype}, on {v.device}, '
            f'got {tuple(gy.shape)}, {gy.dtype}, on {gy.device}'
        )


def _decays(w: Tensor, u: Tensor) -> Tensor:
    return torch.exp(-torch.exp(w.double())).to(u.dtype)


def _new(v: Tensor, u: Tensor) -> Tensor:
    return torch.empty(v.shape, dtype=u.dtype, device=u.device)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool) -> Tensor:
    """Run ``vrwkv_ops::bi_wkv6_forward``."""
    _check(r, k, v, w, u, causal)
    heads, size = u.shape
    y = _new(v, u)
    programs = v.shape[0] * heads * triton.cdiv(size, _COLUMNS)
    if v.numel():
        inputs = (x.contiguous() for x in (r, k, v, _decays(w, u), u))
        with torch.cuda.device_of(v):
            forward_kernel[(programs,)](
                *inputs, y, v.shape[1], heads, size, CAUSAL=causal,
                BLOCK_N=triton.next_power_of_2(size), BLOCK_V=_COLUMNS,
            )  # fmt: skip
    return y.to(v.dtype)


def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Run ``vrwkv_ops::bi_wkv6_backward``."""
    _check(r, k, v, w, u, causal, gy)
    heads, size = u.shape
    programs, chunks = v.shape[0] * heads, triton.cdiv(v.shape[1], _CHUNK)
    block = triton.next_power_of_2(size)
    gr, gk, gv, gd = (_new(v, u) for _ in range(4))
    gu = u.new_zeros(v.shape[0], *u.shape)
    if v.numel():
        edges = u.new_empty(programs, chunks, block, block)
        states = u.new_empty(programs, _CHUNK, block, block)
        inputs = [x.contiguous() for x in (gy, r, k, v, _decays(w, u), u)]
        with torch.cuda.device_of(v):
            for reverse in (False,) if causal else (False, True):
                backward_kernel[(programs,)](
                    *inputs, gr, gk, gv, gd, gu, edges, states, v.shape[1], heads, size, chunks,
                    REVERSE=reverse, BLOCK_N=block, CHUNK=_CHUNK,
                )  # fmt: skip
    exponent = w.double().clamp(max=LARGE)  # where w is large, the decay is 0
    gw = (-torch.exp(exponent - torch.exp(exponent)) * gd).to(w.dtype).contiguous()
    return gr.to(r.dtype), gk.to(k.dtype), gv.to(v.dtype), gw, gu.sum(0)
