"""The operators in PyTorch's own functional operators, for exporters and other compilers.

``exported_program.run_decompositions(decompositions())`` leaves no operator of vrwkv_ops in a graph
for inference. The number of operators does not depend on the number of tokens, T, which may be
symbolic. docs/deployment.md compares the forms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vrwkv_ops import pointwise
from vrwkv_ops.checks import MAX_KEY, accumulation_dtype, shift_bounds

#: The forms of Bi-WKV that :func:`decompositions` accepts.
FORMS = ('auto', 'cumsum', 'blocked', 'chunked')
CHUNK = 16
_BLOCK = 32
_NOTHING = -1e30  # an exponent that stands for no weight; infinity would turn into NaN


def decompositions(form: str = 'auto', chunk: int = CHUNK) -> dict:
    """Return a table for :meth:`torch.export.ExportedProgram.run_decompositions`.

    With the table, ``run_decompositions`` replaces the operators of vrwkv_ops and no others. Add
    the table to :func:`torch.export.default_decompositions` to replace PyTorch's composite
    operators, too.

    Args:
        form: How to compute Bi-WKV. An image's total decay is ``abs(w) * T``.

            - ``'cumsum'``: a cumulative sum over all tokens; up to a total decay of 40.
            - ``'blocked'``: the same with matrix products in place of the sum, for runtimes without
              a cumulative sum.
            - ``'chunked'``: a cumulative sum in each chunk of tokens, and exact joins between the
              chunks; up to ``abs(w) * chunk`` of 80. Memory grows with the square of the number of
              chunks.
            - ``'auto'``: ``'chunked'`` for causal operators, ``'cumsum'`` for others.
        chunk: Tokens in a chunk.

    Returns:
        Operators and the functions that replace them.

    Raises:
        ValueError: If the form is unknown, or ``chunk`` is below 1.
    """
    if form not in FORMS:
        raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form!r}')
    if chunk < 1:
        raise ValueError(f'chunk must be at least 1, got {chunk}')
    ops = torch.ops.vrwkv_ops
    bi_wkv_forward = partial(_bi_wkv, form=form, chunk=chunk)

    def bi_wkv(w, u, k, v, causal):
        dtype = accumulation_dtype(k.dtype)
        return bi_wkv_forward(w.to(dtype), u.to(dtype), k, v, causal, save=False)[0]

    return {
        ops.bi_wkv.default: bi_wkv,
        ops.bi_wkv_forward.default: bi_wkv_forward,
        ops.bi_wkv6_forward.default: _bi_wkv6,
        ops.q_shift.default: _q_shift,
        ops.token_shift.default: _token_shift,
        ops.token_shift_forward.default: _token_shift,
        ops.ms_deform_attn.default: _ms_deform_attn,
        ops.squared_relu.default: pointwise.squared_relu,
        ops.sigmoid_gate.default: pointwise.sigmoid_gate,
    }


# --- Bi-WKV ------------------------------------------------------------------------------------


def _bi_wkv(w, u, k, v, causal, save, *, form: str, chunk: int):
    """Replace ``bi_wkv_forward`` of inference; see :func:`vrwkv_ops.bi_wkv` for the arguments."""
    if save:
        raise ValueError(
            'decompositions() serve inference, and this graph keeps tensors for a backward pass: '
            'export it under torch.no_grad()'
        )
    if causal and form in ('cumsum', 'blocked'):
        raise ValueError(
            f"form='{form}' computes the attention in both directions, and this model is causal: "
            "use form='chunked'"
        )
    dtype = k.dtype
    k, v = k.to(w.dtype).clamp(-MAX_KEY, MAX_KEY), v.to(w.dtype)
    if form == 'chunked' or causal:
        y = _chunked(w, u, k, v, causal, chunk)
    else:
        y = _one_frame(w, u, k, v, _blocked_sum if form == 'blocked' else _exclusive_sum)
    return y.to(dtype), k.new_empty(0, dtype=dtype), w.new_empty(0)


def _pieces(tokens: int, size: int) -> int:
    """Return the number of pieces that tokens are cut into after padding.

    There is always some padding and more than one piece: exporters treat sizes of 0 and 1 apart.
    """
    return tokens // size + 2


def _exclusive_sum(x: Tensor) -> Tensor:
    """Sum all tokens before each one, over dimension -2."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _blocked_sum(x: Tensor) -> Tensor:
    """Sum as :func:`_exclusive_sum` does, by two levels of products with triangular matrices."""
    tokens = x.shape[-2]
    blocks = _pieces(tokens, _BLOCK)
    x = F.pad(x, (0, 0, 0, blocks * _BLOCK - tokens)).unflatten(-2, (blocks, _BLOCK))
    inside = _before(_BLOCK, x) @ x
    between = _before(blocks, x) @ x.sum(-2)
    return (inside + between.unsqueeze(-2)).flatten(-3, -2)[..., :tokens, :]


def _before(size: int, like: Tensor) -> Tensor:
    """Return the matrix that sums all rows before each one."""
    index = torch.arange(size, device=like.device)
    return (index[None, :] < index[:, None]).to(like.dtype)


def _frame(w: Tensor, tokens: int) -> Tensor:
    """Return ``w`` times the distance of each token from the centre, (tokens, C)."""
    position = torch.arange(tokens, device=w.device, dtype=w.dtype) - (tokens - 1) / 2
    return position[:, None] * w


def _one_frame(w, u, k, v, exclusive_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute Bi-WKV with all weights relative to the centre of the image.

    The weight of token i for a later token t is ``exp(k_i + w i) * exp(w - w t)``: sums of the
    first factors serve all tokens. Keys are taken relative to their largest over the image.
    """
    weights = (k - k.amax(1, keepdim=True)).exp()
    pair = torch.stack((weights * v, weights))  # numerator and denominator
    frame = _frame(w, k.shape[1])
    grow, shrink = frame.exp(), (-frame).exp()
    past = shrink * exclusive_sum(pair * grow)
    future = grow * exclusive_sum((pair * shrink).flip(2)).flip(2)
    top = u.clamp(min=0)  # a large bonus must not overflow
    total = (w - top).exp() * (past + future) + (u - top).exp() * pair
    return total[0] / total[1]


def _chunked(w, u, k, v, causal: bool, chunk: int) -> Tensor:
    """Compute Bi-WKV with a frame for each chunk of tokens.

    Inside a chunk the sums are those of :func:`_one_frame`. Each chunk's sum at its edges reaches
    the other chunks with its exponent apart, so that no weight overflows.
    """
    tokens = k.shape[1]
    chunks = _pieces(tokens, chunk)
    pad = (0, 0, 0, chunks * chunk - tokens)
    k = F.pad(k, pad, value=_NOTHING).unflatten(1, (chunks, chunk))
    v = F.pad(v, pad).unflatten(1, (chunks, chunk))
    top = k.amax(2, keepdim=True)  # (B, chunks, 1, C)
    weights = (k - top).exp()
    pair = torch.stack((weights * v, weights))  # (2, B, chunks, chunk, C)
    frame = _frame(w, chunk)
    grow, shrink = frame.exp(), (-frame).exp()
    index = torch.arange(chunk, device=w.device, dtype=w.dtype)[:, None]

    def join(state: Tensor, back: bool) -> tuple[Tensor, Tensor]:
        """Sum the states of all chunks before (or after) each one, and return the exponents."""
        number = torch.arange(chunks, device=w.device)
        gap = (number[:, None] - number[None, :]) * (-1 if back else 1) - 1
        decay = -(gap.clamp(min=0).to(w.dtype) * chunk)[..., None] * w
        exponent = torch.where((gap < 0)[..., None], _NOTHING, top[:, None, :, 0] + decay)
        largest = exponent.amax(2)  # (B, chunks, C)
        weight = (exponent - largest[:, :, None]).exp()
        total = (weight * state[:, :, None]).sum(3)
        return total.unsqueeze(3), largest.unsqueeze(2)

    # (sum, exponent) of the token itself, of its chunk, and of the chunks before and after it.
    scaled = pair * grow
    edge = (-w * (chunk - 1) / 2).exp()
    parts = [(pair, top + u), (shrink * _exclusive_sum(scaled), top + w)]
    before, exponent = join(edge * scaled.sum(3), back=False)
    parts.append((before, exponent - index * w))
    if not causal:
        scaled = pair * shrink
        parts.append((grow * _exclusive_sum(scaled.flip(3)).flip(3), top + w))
        after, exponent = join(edge * scaled.sum(3), back=True)
        parts.append((after, exponent - (chunk - 1 - index) * w))
    largest = parts[0][1]
    for _, exponent in parts[1:]:
        largest = torch.maximum(largest, exponent)
    total = sum(part * (exponent - largest).exp() for part, exponent in parts)
    return (total[0] / total[1]).flatten(1, 2)[:, :tokens]


# --- Bi-WKV6 -----------------------------------------------------------------------------------


def _bi_wkv6(r, k, v, w, u, causal):
    """Replace ``bi_wkv6_forward``: pairs of tokens in chunks, and pairs of chunks.

    The exponents are sums of the rates of the tokens between two, in float64 across chunks, where
    they are differences of cumulative sums. Memory grows with the square of the number of chunks.
    """
    dtype, tokens = v.dtype, v.shape[1]
    chunks = _pieces(tokens, CHUNK)

    def split(x: Tensor) -> Tensor:  # (B, heads, chunks, CHUNK, N)
        x = F.pad(x.to(u.dtype), (0, 0, 0, chunks * CHUNK - tokens))
        x = x.unflatten(2, (u.shape[0], u.shape[1])).unflatten(1, (chunks, CHUNK))
        return x.permute(0, 3, 1, 2, 4)

    r, k, v = split(r), split(k), split(v)
    rate = split(w.clamp(max=7).exp())  # a token with a rate of e^7 lets nothing pass
    # Inside a chunk: the rates of the tokens strictly between two of it.
    index = torch.arange(CHUNK, device=v.device)
    low = torch.minimum(index[:, None], index[None, :])[..., None]
    high = torch.maximum(index[:, None], index[None, :])[..., None]
    between = ((index > low) & (index < high)).to(u.dtype).flatten(0, 1)
    factor = (-(between @ rate)).exp().unflatten(3, (CHUNK, CHUNK))
    own = (index[:, None] == index[None, :])[..., None]
    factor = torch.where(own, u[None, :, None, None, None], factor)
    scores = (r.unsqueeze(4) * k.unsqueeze(3) * factor).sum(-1)
    if causal:
        scores = torch.where(index[:, None] >= index[None, :], scores, 0.0)
    y = scores @ v
    # Between chunks: the state that a chunk leaves decays over the chunks on the way.
    before = _exclusive_sum(rate)
    after = _exclusive_sum(rate.flip(3)).flip(3)
    whole = rate.sum(3, dtype=torch.float64).transpose(2, 3)  # (B, heads, N, chunks)
    sums = whole.cumsum(3)
    gap = (sums - whole).unsqueeze(-1) - sums.unsqueeze(-2)
    number = torch.arange(chunks, device=v.device)
    later = number[:, None] > number[None, :]
    decay = torch.where(later, (-gap.clamp(min=0)).exp(), 0.0).to(u.dtype)

    def read(out_rate: Tensor, in_rate: Tensor, decay: Tensor) -> Tensor:
        left = (k * (-out_rate).exp()).mT @ v  # (B, heads, chunks, N, N)
        state = (decay @ left.transpose(2, 3)).transpose(2, 3)
        return (r * (-in_rate).exp()) @ state

    y = y + read(after, before, decay)
    if not causal:
        y = y + read(before, after, decay.mT)
    return y.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)[:, :tokens].to(dtype)


# --- Token shifts ------------------------------------------------------------------------------


def _shift(x: Tensor, height, width, pixel: int, gamma: float, mode: str, heads: int) -> Tensor:
    """Shift groups of channels, which repeat in each head, with slices and padding."""
    grid = x.unflatten(1, (height, width)).unflatten(3, (heads, x.shape[2] // heads))
    bounds = shift_bounds(grid.shape[-1], gamma, mode)
    parts = [grid[..., bounds[4] :]]
    for group in reversed(range(4)):
        part = grid[..., bounds[group] : bounds[group + 1]]
        if part.shape[-1] == 0:
            continue
        axis, forward = (2, 1)[group // 2], group % 2 == 0
        if pixel:
            size = part.shape[axis]
            part = F.pad(part, (0, 0) * (4 - axis) + ((pixel, 0) if forward else (0, pixel)))
            part = part.narrow(axis, 0 if forward else pixel, size)
        parts.insert(0, part)
    return torch.cat(parts, -1).flatten(3).flatten(1, 2)


def _q_shift(x, height, width, shift_pixel, channel_gamma, reverse, heads=1):
    if reverse:
        raise ValueError('decompositions() serve inference: export under torch.no_grad()')
    return _shift(x, height, width, shift_pixel, channel_gamma, 'q_shift', heads)


def _token_shift(x, mixes, height, width, shift_pixel, channel_gamma, mode, heads=1):
    dtype = accumulation_dtype(x.dtype)
    own = x.to(dtype)
    shifted = _shift(own, height, width, shift_pixel, channel_gamma, mode, heads)
    return [torch.lerp(shifted, own, mix.to(dtype)).to(x.dtype) for mix in mixes]


# --- Multi-scale deformable attention ----------------------------------------------------------


def _ms_deform_attn(value, shapes, locations, weights):
    """Sample one map after the other with PyTorch's ``grid_sample``."""
    dtype = accumulation_dtype(value.dtype)
    batch, heads = value.shape[0], value.shape[2]
    places, weights = 2 * locations.to(dtype) - 1, weights.to(dtype)
    total, start = 0, 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        pixels = value[:, start : start + height * width].to(dtype)
        start += height * width
        maps = pixels.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        grid = places[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * H, Q, P, 2)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)
        total = total + (F.grid_sample(maps, grid, align_corners=False) * weight).sum(-1)
    return total.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2).to(value.dtype)
