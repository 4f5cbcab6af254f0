"""The public functions of the operators; :mod:`vrwkv_ops.definitions` and ``csrc/`` define them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrwkv_ops import backends, definitions, pointwise, triton
from vrwkv_ops.checks import (
    accumulation_dtype,
    check_bi_wkv,
    check_bi_wkv6,
    check_ms_deform_attn,
    check_pointwise,
    check_q_shift,
    check_token_shift,
)

backends.load()
definitions.complete('vrwkv_ops')
SCAN_KERNELS = {op.name: op.run_kernel for op in definitions.OPERATORS if not op.is_composite}
if backends.triton_serves_gpus():
    triton.serve('CUDA', SCAN_KERNELS)
_ops = torch.ops.vrwkv_ops
_bi_wkv = _ops.bi_wkv.default
_bi_wkv6 = _ops.bi_wkv6_forward.default
_q_shift = _ops.q_shift.default
_token_shift = _ops.token_shift.default
_token_shift_forward = _ops.token_shift_forward.default
_ms_deform_attn = _ops.ms_deform_attn.default
_squared_relu = _ops.squared_relu.default
_sigmoid_gate = _ops.sigmoid_gate.default
# Wrong arguments raise these. They are explained afterwards: checks take longer than small kernels.
_ERRORS = (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    r"""Bi-WKV attention of Vision-RWKV (paper equation 5), in time linear in T.

    .. math::
        y_t = \frac{\sum_{i \ne t} e^{k_i - w (|t - i| - 1)} v_i + e^{u + k_t} v_t}
                   {\sum_{i \ne t} e^{k_i - w (|t - i| - 1)} + e^{u + k_t}}

    Differentiable once in all tensors. Results are deterministic. Float16 and bfloat16 are
    accumulated in float32. Under autocast ``k`` and ``v`` take autocast's dtype.

    Args:
        w: Decay per token step, of either sign, shape (C,). The layers of VRWKV pass
            ``spatial_decay / T``.
        u: Bonus of the current token, shape (C,). The layers pass ``spatial_first / T``.
        k: Keys, shape (B, T, C), with any strides.
        v: Values, of the shape and dtype of ``k``, with any strides.
        causal: If true, a token sees only itself and the tokens before it (``i <= t``, as in
            RWKV's original attention).

    Returns:
        Tensor of the shape and dtype of ``k``, contiguous.

    Raises:
        TypeError: If an argument is no tensor or has a dtype that is not accepted.
        ValueError: If a rank, a shape or a device does not fit.
    """
    if torch.compiler.is_compiling() or not isinstance(causal, bool):
        check_bi_wkv(w, u, k, v, causal)
        return _bi_wkv(w, u, k, v, causal)
    try:
        return _bi_wkv(w, u, k, v, causal)
    except _ERRORS:
        check_bi_wkv(w, u, k, v, causal)  # says more about a wrong argument
        raise


def bi_wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool = False) -> Tensor:
    r"""Bi-WKV6, the attention of VRWKV6: RWKV-6 in both directions, in time linear in T.

    In each head, for the value channels of a token t,

    .. math::
        y_t = \sum_i \Big( \sum_c r_{tc} k_{ic} E_{tic} \Big) v_i, \quad
        E_{tic} = \prod_{m \text{ between } t \text{ and } i} e^{-e^{w_{mc}}}, \quad E_{ttc} = u_c

    (`Eagle and Finch <https://arxiv.org/abs/2404.05892>`_, section 4.2, where only earlier tokens
    count). There is no denominator. Differentiable once in all tensors. Results are deterministic.
    Float16 and bfloat16 are accumulated in float32; under autocast results are float32.

    Args:
        r: Receptances, shape (B, T, C), with any strides.
        k: Keys, of the shape and dtype of ``r``.
        v: Values, of the shape and dtype of ``r``.
        w: Decays of each token: a step multiplies by ``exp(-exp(w))``. Of the shape of ``r``.
        u: Bonus of the current token, shape (heads, N): C = heads * N, N from 8 to 64 in steps of
            8. Heads are runs of channels.
        causal: If true, a token sees only itself and the tokens before it.

    Returns:
        Tensor of the shape and dtype of ``v``, contiguous.

    Raises:
        TypeError: If an argument is no tensor or has a dtype that is not accepted.
        ValueError: If a rank, a shape, the size of heads or a device does not fit.
    """
    check_bi_wkv6(r, k, v, w, u, causal)
    dtype = accumulation_dtype(v.dtype)
    return _bi_wkv6(r, k, v, w.to(dtype), u.to(dtype), causal)


def q_shift(
    x: Tensor,
    resolution: tuple[int, int],
    shift_pixel: int = 1,
    channel_gamma: float = 1 / 4,
    heads: int = 1,
) -> Tensor:
    """Q-Shift, the four-way token shift of Vision-RWKV (paper section 3.3).

    Four channel groups take the token ``shift_pixel`` to the left, to the right, above and below;
    tokens outside the grid are zero. Group n covers the channels ``int(C * gamma * (n - 1))`` to
    ``int(C * gamma * n)``; channels past the groups are not shifted. With several heads the groups
    repeat in each of them, and C is the number of a head's channels: VRWKV6's shift, upstream's
    ``q_shift_multihead``.

    Args:
        x: Tokens in row-major order, shape (B, H * W, C), with any strides.
        resolution: The token grid (H, W).
        shift_pixel: Distance in tokens, at least 0.
        channel_gamma: Share of a head's channels in one group, in (0, 1/4].
        heads: Equal runs of channels, each with its own groups.

    Returns:
        Tensor of the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: If an argument has a type or dtype that is not accepted.
        ValueError: If a shape or value does not fit, ``heads`` do not divide the channels, or a
            head is too small for four groups.
    """
    check_q_shift(x, resolution, shift_pixel, channel_gamma, heads)
    height, width = resolution
    return _q_shift(x, height, width, shift_pixel, float(channel_gamma), False, heads)


def token_shift(
    x: Tensor,
    mixes: Tensor | Sequence[Tensor],
    resolution: tuple[int, int] | None = None,
    shift_pixel: int = 1,
    channel_gamma: float | None = 1 / 4,
    mode: str = 'q_shift',
    heads: int = 1,
) -> tuple[Tensor, ...]:
    """Mix tokens with shifted neighbours: ``x * mix + shift(x) * (1 - mix)`` for each mix.

    One pass computes all results (paper section 3.3: the inputs of the key, value and receptance
    layers), and only ``x`` and the mixes are kept for the backward pass. Differentiable once
    in ``x`` and the mixes. Results are deterministic. Float16 and bfloat16 are mixed in float32.

    Args:
        x: Tokens, shape (B, T, C), with any strides.
        mixes: One to three weights of the tokens themselves: tensors of shape (C,) or (1, 1, C), or
            one tensor of shape (n, C).
        resolution: The token grid (H, W) with H * W = T, in row-major order. Only Q-Shift needs it.
        shift_pixel: Distance in tokens, at least 0.
        channel_gamma: Share of a head's channels in one group, in (0, 1/4]. ``'single_shift'`` has
            no groups and ignores it.
        mode: ``'q_shift'``, four groups of channels that take the token to the left, to the right,
            above and below, see :func:`q_shift`; ``'single_shift'``, all channels take the token
            before; ``'double_shift'``, a first group takes the token before, a second one the token
            after. Other channels are not shifted; tokens outside the sequence are zero.
        heads: Equal runs of channels, each with its own groups.

    Returns:
        For each mix a contiguous tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: If an argument has a type or dtype that is not accepted.
        ValueError: If a shape, a value or a device does not fit, ``heads`` do not divide the
            channels, or a head is too small for the groups.
    """
    arguments = mixes, resolution, shift_pixel, channel_gamma, mode, heads
    if torch.compiler.is_compiling():
        check_token_shift(x, *arguments)
        return _shifted(x, *arguments)
    try:
        return _shifted(x, *arguments)
    except _ERRORS:
        check_token_shift(x, *arguments)  # says more about a wrong argument
        raise


def _shifted(x, mixes, resolution, shift_pixel, channel_gamma, mode, heads):
    height, width = resolution if mode == 'q_shift' else (1, x.shape[1])
    # PyTorch 2.6 to 2.8 do not compile the same with map.
    if bool in (type(height), type(width), type(shift_pixel), type(heads)):
        raise TypeError  # the dispatcher would take it for an int
    gamma = 1 / 4 if mode == 'single_shift' else channel_gamma  # single_shift has no groups
    options = height, width, shift_pixel, gamma, mode, heads
    if isinstance(mixes, Tensor):  # joined already: no copy is made
        check_token_shift(x, mixes, resolution, shift_pixel, channel_gamma, mode, heads)
        mixes = mixes.to(accumulation_dtype(x.dtype)).contiguous()
        return tuple(_token_shift_forward(x, mixes, *options))
    return tuple(_token_shift(x, mixes, *options))


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    r"""Multi-scale deformable attention of `Deformable DETR <https://arxiv.org/abs/2010.04159>`_.

    Equation 3 there. Each query and head samples P points of each of L maps by bilinear
    interpolation and sums them with its attention weights. Pixels have their centres at
    ``((column + 0.5) / width, (row + 0.5) / height)``; outside a map all values are zero, as in
    mmcv's ``MultiScaleDeformableAttention``. No temporary is larger than the output if all tensors
    are contiguous. Differentiable once in the tensors. Float16 and bfloat16 are accumulated in
    float32. Results are deterministic on the CPU, and on a GPU if
    ``torch.use_deterministic_algorithms`` asks for it.

    Args:
        value: Values of all maps, each in row-major order, shape (B, S, H, D).
        spatial_shapes: Height and width of the L maps, at most 16; S values in all.
        sampling_locations: x and y of the points as fractions of the map, shape
            (B, Q, H, L, P, 2). Those outside [0, 1] are near or beyond the border. Where ``value``
            has a half type, float32 points keep neighbouring points of a large map apart.
        attention_weights: Weights of the points, shape (B, Q, H, L, P).

    Returns:
        Tensor of shape (B, Q, H * D) and the dtype of ``value``, contiguous.

    Raises:
        TypeError: If an argument has a type or dtype that is not accepted.
        ValueError: If a shape, a value or a device does not fit.
    """
    check_ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    shapes = [side for shape in spatial_shapes for side in shape]
    dtype = accumulation_dtype(value.dtype)
    if sampling_locations.dtype != value.dtype or attention_weights.dtype != value.dtype:
        sampling_locations = sampling_locations.to(dtype)
        attention_weights = attention_weights.to(dtype)
    return _ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def squared_relu(x: Tensor) -> Tensor:
    """Compute ``relu(x) ** 2`` in one pass (paper, equation 4).

    Differentiable once. While torch compiles or exports, the compiler fuses PyTorch's own
    operators instead.

    Args:
        x: Tensor of any shape.

    Returns:
        Tensor of the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: If ``x`` is no tensor or has a dtype that is not accepted.
    """
    if torch.compiler.is_compiling():
        check_pointwise('squared_relu', x=x)
        return pointwise.squared_relu(x)
    try:
        return _squared_relu(x)
    except _ERRORS:
        check_pointwise('squared_relu', x=x)
        raise


def sigmoid_gate(r: Tensor, x: Tensor) -> Tensor:
    """Compute ``sigmoid(r) * x`` in one pass (paper, equations 2 and 4).

    Differentiable once. While torch compiles or exports, the compiler fuses PyTorch's own
    operators instead.

    Args:
        r: Logits of the gate, of any shape.
        x: The gated tensor, of the shape of ``r``.

    Returns:
        Contiguous tensor of that shape; if the dtypes differ, of the wider one.

    Raises:
        TypeError: If an argument is no tensor or has a dtype that is not accepted.
        ValueError: If the two differ in shape or device.
    """
    if torch.compiler.is_compiling():
        check_pointwise('sigmoid_gate', r=r, x=x)
        return pointwise.sigmoid_gate(*_of_one_dtype(r, x))
    try:
        return _sigmoid_gate(*_of_one_dtype(r, x))
    except _ERRORS:
        check_pointwise('sigmoid_gate', r=r, x=x)
        raise


def _of_one_dtype(r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if r.dtype == x.dtype:
        return r, x
    check_pointwise('sigmoid_gate', r=r, x=x)
    dtype = torch.promote_types(r.dtype, x.dtype)  # with autocast a layer norm may lie between them
    return r.to(dtype), x.to(dtype)
