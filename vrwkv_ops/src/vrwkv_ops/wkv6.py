"""Bi-WKV6 in plain PyTorch, chunk by chunk, on any device.

Between two tokens lies a product of decays. Here it is always a product of factors of at most 1,
each the exponential of a sum of non-positive logarithms: of the tokens of a chunk before a token,
after it, or of all. Nothing is subtracted, so nothing overflows or cancels, for any decay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16
# exp(-exp(w)) is 0 beyond it in any dtype, and exp(w) is still finite.
LARGE = 60


class _Chunks(NamedTuple):
    """Inputs in chunks, (B, H, chunks, CHUNK, N), and decays (at most 1)."""

    r: Tensor
    k: Tensor
    v: Tensor
    d: Tensor  #: Of each token.
    before: Tensor  #: Of the tokens of its chunk before each token.
    after: Tensor  #: Of those after it.
    whole: Tensor  #: Of all tokens of a chunk, (B, H, chunks, N).


def _split(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Cut (B, T, C) into chunks; zeros fill the last one."""
    x = F.pad(x.to(dtype), (0, 0, 0, -x.shape[1] % CHUNK))
    x = x.unflatten(2, (heads, x.shape[2] // heads)).unflatten(1, (x.shape[1] // CHUNK, CHUNK))
    return x.permute(0, 3, 1, 2, 4)


def _join(x: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_split`."""
    x = x.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
    return x[:, : like.shape[1]].to(like.dtype).contiguous()


def _chunks(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> _Chunks:
    r, k, v = (_split(x, u.shape[0], u.dtype) for x in (r, k, v))
    log_d = _split(-torch.exp(w), u.shape[0], w.dtype)
    logs = (log_d, _sum_before(log_d), _sum_after(log_d), log_d.sum(3))
    return _Chunks(r, k, v, *(log.exp() for log in logs))


def _sum_before(x: Tensor) -> Tensor:
    """Sum over the earlier tokens of a chunk, without the token itself."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(3)


def _sum_after(x: Tensor) -> Tensor:
    return _sum_before(x.flip(3)).flip(3)


def _states(keys: Tensor, values: Tensor, whole: Tensor, reverse: bool) -> Tensor:
    """Sum ``keys^T values`` over all chunks before each chunk, or after it if ``reverse``.

    Returns:
        States of shape (B, H, chunks, N, N).
    """
    new = keys.mT @ values
    states = torch.zeros_like(new)
    state = torch.zeros_like(new[:, :, 0])
    order = range(new.shape[2])
    for n in reversed(order) if reverse else order:
        states[:, :, n] = state
        state = whole[:, :, n, :, None] * state + new[:, :, n]
    return states


def _between(d: Tensor) -> list[Tensor]:
    """Return, for each distance s from 1, the decay between the tokens i and i + s of a chunk."""
    decays = [torch.ones_like(d[..., 1:, :])]
    for s in range(1, CHUNK - 1):
        decays.append(decays[-1][..., :-1, :] * d[..., s:-1, :])
    return decays


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool) -> Tensor:
    """Compute Bi-WKV6; arguments as for :func:`vrwkv_ops.bi_wkv6`, w and u for accumulation.

    Returns:
        y of the shape and dtype of ``v``.
    """
    c = _chunks(r, k, v, w, u)
    y = _scores(c, u, causal) @ c.v
    y += (c.r * c.before) @ _states(c.k * c.after, c.v, c.whole, False)
    if not causal:
        y += (c.r * c.after) @ _states(c.k * c.before, c.v, c.whole, True)
    return _join(y, v)


def _scores(c: _Chunks, u: Tensor, causal: bool) -> Tensor:
    """Compute the weight of each value of a chunk in each result: (B, H, chunks, CHUNK, CHUNK)."""
    scores = c.r.new_zeros(*c.r.shape[:4], CHUNK)
    _diagonal(scores, 0).copy_((c.r * c.k * u[:, None, None, :]).sum(4))
    for s, decay in enumerate(_between(c.d), start=1):
        _diagonal(scores, -s).copy_((c.r[..., s:, :] * c.k[..., :-s, :] * decay).sum(4))
        if not causal:
            _diagonal(scores, s).copy_((c.r[..., :-s, :] * c.k[..., s:, :] * decay).sum(4))
    return scores


def _diagonal(x: Tensor, offset: int) -> Tensor:
    return x.diagonal(offset, 3, 4)


def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool
) -> Sequence[Tensor]:
    """Return the gradients of :func:`forward`.

    That of w comes from products of states and adjoint states and from sums over pairs of tokens
    of one chunk; nothing is subtracted.

    Args:
        gy: Gradient of y.
        r: As in :func:`forward`, like all that follow.
        k: See ``r``.
        v: See ``r``.
        w: See ``r``.
        u: See ``r``.
        causal: See ``r``.

    Returns:
        Gradients of r, k, v, w and u, in their dtypes.
    """
    c, g = _chunks(r, k, v, w, u), _split(gy, u.shape[0], u.dtype)
    gscores = g @ c.v.mT
    gv = _scores(c, u, causal).mT @ g
    gr, gk, glog, gu = _pair_gradients(c, u, gscores, causal)
    for reverse in (False,) if causal else (False, True):
        of_r, of_k = (c.after, c.before) if reverse else (c.before, c.after)
        states = _states(c.k * of_k, c.v, c.whole, reverse)
        adjoints = _states(c.r * of_r, g, c.whole, not reverse)
        gv += (c.k * of_k) @ adjoints
        part_r, part_k = of_r * (g @ states.mT), of_k * (c.v @ adjoints.mT)
        gr += part_r
        gk += part_k
        first, second = (part_k, part_r) if reverse else (part_r, part_k)
        scaled = (c.k * first, c.r * second) if reverse else (c.r * first, c.k * second)
        glog += _sum_after(scaled[0]) + _sum_before(scaled[1])
        glog += (c.whole * (states * adjoints).sum(4))[..., None, :]
    # Where w is large the decay is 0, and so is glog.
    gw = -_join(glog, w) * torch.exp(w.clamp(max=LARGE))
    return _join(gr, r), _join(gk, k), _join(gv, v), gw.contiguous(), gu


def _pair_gradients(
    c: _Chunks, u: Tensor, gscores: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, k, log decay and u from the pairs of tokens in each chunk."""
    own = _diagonal(gscores, 0)[..., None]
    bonus = u[:, None, None, :]
    gr, gk = own * bonus * c.k, own * bonus * c.r
    gu = (own * c.r * c.k).sum((0, 2, 3))
    pairs = []  # the share of the decay between i and i + s, for each s
    for s, decay in enumerate(_between(c.d), start=1):
        early, late = slice(None, -s), slice(s, None)
        pair = torch.zeros_like(decay)
        for offset, to, source in ((-s, late, early), (s, early, late))[: 1 if causal else 2]:
            scale = _diagonal(gscores, offset)[..., None] * decay
            of_r = scale * c.k[..., source, :]
            gr[..., to, :] += of_r
            gk[..., source, :] += scale * c.r[..., to, :]
            pair += of_r * c.r[..., to, :]
        pairs.append(pair)
    # The tokens between i and i + s are i + 1 and those between i + 1 and i + s.
    glog = torch.zeros_like(c.r)
    for s in range(CHUNK - 1, 1, -1):
        glog[..., 1 : CHUNK - s + 1, :] += pairs[s - 1]
        pairs[s - 2][..., 1:, :] += pairs[s - 1]
    return gr, gk, glog, gu
