"""Bi-WKV in plain PyTorch: a log-step scan, forward and backward, on any device.

Every sum of the operator has the form ``S_t = sum_i e^(k_i - w n_i) x_i``, where ``n_i`` counts the
steps from token ``i`` to token ``t``. A state ``(x, k, n)`` is the sum over a
part of the sequence and means ``x e^(k - w n)``, where ``k`` and ``n`` belong to its largest term:
exponents are not accumulated, so that T rounding errors cannot add up, and no factor is above 1.
Two neighbouring states combine into one, and this is associative.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vrwkv_ops.checks import MAX_KEY


class _States(NamedTuple):
    """One state per token, with the value ``sums * exp(k - w * n)``."""

    sums: Tensor  # (F, B, T, C), F different sums under the same exponents
    moments: Tensor | None  # (F, B, T, C), with a factor in each term: see backward
    k: Tensor  # (B, T, C)
    n: Tensor  # (B, T, C), whole numbers in the accumulation dtype

    def map(self, function) -> '_States':
        """Apply ``function``, which may use dimensions -2 and -1 only, to every tensor."""
        return _States(*(None if tensor is None else function(tensor) for tensor in self))


def _leaves(sums: Tensor, k: Tensor, moments: Tensor | None = None) -> _States:
    return _States(sums, moments, k, k.new_zeros(()).expand_as(k))


def _combine(far: _States, near: _States, w: Tensor, steps: int) -> _States:
    """Add states: ``far``, moved by ``steps`` tokens, and ``near``.

    In channels with w >= 0, a move adds the steps to the factors of the moments.
    """
    far_n = far.n + steps
    # The log of far's scale over near's, from differences: exact for nearby terms, which matter.
    excess = torch.addcmul(far.k - near.k, w, far_n - near.n, value=-1)
    far_scale = excess.clamp(max=0).exp()
    near_scale = excess.neg().clamp(max=0).exp()
    moments = None
    if far.moments is not None:
        moved = torch.addcmul(far.moments, (w >= 0).to(w.dtype), far.sums, value=steps)
        moments = far_scale * moved + near_scale * near.moments
    return _States(
        far_scale * far.sums + near_scale * near.sums,
        moments,
        torch.where(excess > 0, far.k, near.k),
        torch.where(excess > 0, far_n, near.n),
    )


def _inclusive_scan(states: _States, w: Tensor, span: int = 1) -> _States:
    """Sum, for every token, all states up to and including it.

    Pairs of neighbours are combined and scanned in turn, so the work is linear in T and the number
    of PyTorch calls logarithmic. Each of ``states`` stands for ``span`` tokens.
    """
    length = states.k.shape[-2]
    if length == 1:
        return states
    first = states.map(lambda x: x[..., : length - 1 : 2, :])
    second = states.map(lambda x: x[..., 1::2, :])
    at_odd = _inclusive_scan(_combine(first, second, w, span), w, 2 * span)
    third = states.map(lambda x: x[..., 2::2, :])
    if length == 2:
        at_even = states.map(lambda x: x[..., :1, :])
    else:
        before = at_odd.map(lambda x: x[..., : (length - 1) // 2, :])
        rest = _combine(before, third, w, span)
        at_even = _States(
            *(
                None if x is None else torch.cat([x[..., :1, :], y], dim=-2)
                for x, y in zip(states, rest, strict=True)
            )
        )
    return _States(
        *(None if x is None else _interleave(x, y) for x, y in zip(at_even, at_odd, strict=True))
    )


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    out = even.new_empty(*even.shape[:-2], even.shape[-2] + odd.shape[-2], even.shape[-1])
    out[..., 0::2, :] = even
    out[..., 1::2, :] = odd
    return out


def _exclusive_scan(states: _States, w: Tensor, reverse: bool) -> _States:
    """Sum, for every token, all states before it (after it, if ``reverse``).

    Exponents count from the neighbour: a state next to the token has n = 0. At the end of the
    sequence, where there is none, the sums are 0 and k is -inf.
    """
    if reverse:
        states = states.map(lambda x: x.flip(-2))
    states = _inclusive_scan(states, w)

    def delay(x: Tensor, first: float) -> Tensor:
        start = x.new_full((*x.shape[:-2], 1, x.shape[-1]), first)
        x = torch.cat([start, x[..., :-1, :]], dim=-2)
        return x.flip(-2) if reverse else x

    return _States(
        delay(states.sums, 0.0),
        None if states.moments is None else delay(states.moments, 0.0),
        delay(states.k, float('-inf')),
        delay(states.n, 0.0),
    )


def token_sum(x: Tensor) -> Tensor:
    """Sum (B, T, C) to (C,) as a balanced tree: accurate, and the same bits at every run."""
    x = x.flatten(0, 1)
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        folded = x[:half] + x[half : 2 * half]
        x = torch.cat([folded, x[2 * half :]]) if x.shape[0] % 2 else folded
    return x.sum(0)  # of one row; of none, zeros


def _headroom(tokens: int) -> float:
    """Return a power of two that keeps sums of the largest floats over all tokens finite."""
    return 0.5 ** (2 * tokens).bit_length()


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Compute Bi-WKV (paper equation 5) in the dtype of ``w``.

    Args:
        w: Decay per token, (C,), in the accumulation dtype.
        u: Bonus of the current token, (C,), in the accumulation dtype.
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        causal: Ignore the tokens that follow.

    Returns:
        Output and log of its denominator, both (B, T, C) in the accumulation dtype.
    """
    k, v = k.to(w.dtype).clamp(-MAX_KEY, MAX_KEY), v.to(w.dtype)
    scale = _headroom(k.shape[1])
    terms = _leaves(torch.stack([v * scale, torch.ones_like(v)]), k)
    total = terms._replace(k=u + k)
    total = _combine(_exclusive_scan(terms, w, reverse=False), total, w, 0)
    if not causal:
        total = _combine(_exclusive_scan(terms, w, reverse=True), total, w, 0)
    numerator, denominator = total.sums
    z = torch.addcmul(total.k, w, total.n, value=-1) + denominator.log()
    return numerator / denominator / scale, z


def backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, z: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of Bi-WKV (docs/operator.md) from the results of :func:`forward`.

    Args:
        gy: Gradient of the output, (B, T, C).
        w: As in :func:`forward`, like ``u``, ``k``, ``v`` and ``causal``.
        u: See ``w``.
        k: See ``w``.
        v: See ``w``.
        y: Output, (B, T, C), in the accumulation dtype.
        z: Log of the denominator, (B, T, C), in the accumulation dtype.
        causal: See ``w``.

    Returns:
        Gradients of ``w``, ``u``, ``k`` and ``v``, in the accumulation dtype.
    """
    gy, v = gy.to(w.dtype), v.to(w.dtype)
    k = k.to(w.dtype).clamp(-MAX_KEY, MAX_KEY)
    tokens = k.shape[1]
    scale = _headroom(tokens)
    v, y = v * scale, y * scale
    # The weight of token i in output t is e^(k_i - z_t - w n): at most 1 without rounding.
    own = (k - z + u).clamp(max=0).exp()
    own_gk = own * gy * (v - y)
    gu = token_sum(own_gk)
    gv, gk = own * gy, own_gk

    # gw = -sum_t sum_i (n - n0_t) weight gy_t (v_i - y_t), for any n0_t, as the terms without a
    # factor add up to 0. Where w decays, n0_t = 0: near tokens weigh most, and have a small n.
    # Where it grows, the farthest weighs most: with its n as n0_t nothing large cancels. Then
    # n - n0_t is (t - far_t) - i for i < t, and (T-1-t - far_t) + i - (T-1) for i > t: a part of t,
    # which goes into the leaves, and one of i.
    grows = (w < 0).to(w.dtype)
    t = torch.arange(tokens, dtype=w.dtype, device=w.device)[:, None]
    to_end = tokens - 1 - t
    far = t if causal else torch.maximum(t, to_end)
    gw = token_sum((far - 1) * grows * own_gk)
    sums = torch.stack([gy, gy * y])
    for after in (True,) if causal else (True, False):  # sums over t > i, then over t < i
        leaf_factor = (t if after else to_end) - far
        i_factor = -t if after else -to_end
        s = _exclusive_scan(_leaves(sums, -z, leaf_factor * grows * sums), w, reverse=after)
        weight = torch.addcmul(k + s.k, w, s.n, value=-1).clamp(max=0).exp()
        moment_g, moment_h = s.moments
        sum_g, sum_h = s.sums
        gk_part = weight * (v * sum_g - sum_h)
        gv = gv + weight * sum_g
        gk = gk + gk_part
        gw = gw - token_sum(weight * (v * moment_g - moment_h) + i_factor * grows * gk_part)
    return gw / scale, gu / scale, gk / scale, gv
