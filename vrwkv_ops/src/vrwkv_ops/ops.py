"""The operators: dispatcher schemas, fakes, autograd and autocast rules, and the public functions.

Compiled kernels (``csrc/``) register themselves for the CPU and CUDA keys of these schemas; the
PyTorch kernels in this file serve all other devices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vrwkv_ops import backends, pointwise, scan, shift, triton
from vrwkv_ops.checks import (
    accumulation_dtype,
    check_bi_wkv,
    check_pointwise,
    check_q_shift,
    check_token_shift,
)

_HALF = (torch.float16, torch.bfloat16)

_lib = torch.library.Library('vrwkv_ops', 'DEF')
for _schema in (
    'bi_wkv_forward(Tensor w, Tensor u, Tensor k, Tensor v, bool causal, bool save)'
    ' -> (Tensor y, Tensor y_residual, Tensor z)',
    'bi_wkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor y,'
    ' Tensor y_residual, Tensor z, bool causal) -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv)',
    'q_shift(Tensor x, SymInt height, SymInt width, int shift_pixel, float channel_gamma,'
    ' bool reverse, int heads=1) -> Tensor',
    'token_shift(Tensor x, Tensor mixes, SymInt height, SymInt width, int shift_pixel,'
    ' float channel_gamma, str mode, int heads=1) -> Tensor[]',
    'token_shift_backward(Tensor[] grads, Tensor x, Tensor mixes, SymInt height, SymInt width,'
    ' int shift_pixel, float channel_gamma, str mode, int heads=1) -> (Tensor gx, Tensor gmixes)',
    'squared_relu(Tensor x) -> Tensor',
    'squared_relu_backward(Tensor grad, Tensor x) -> Tensor',
    'sigmoid_gate(Tensor r, Tensor x) -> Tensor',
    'sigmoid_gate_backward(Tensor grad, Tensor r, Tensor x) -> (Tensor gr, Tensor gx)',
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_ops = torch.ops.vrwkv_ops


# --- Public functions -------------------------------------------------------------------------


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
    check_bi_wkv(w, u, k, v, causal)
    dtype = accumulation_dtype(k.dtype)
    needs_grad = w.requires_grad or u.requires_grad or k.requires_grad or v.requires_grad
    y, _, _ = _ops.bi_wkv_forward(
        w.to(dtype).contiguous(),
        u.to(dtype).contiguous(),
        k,
        v,
        causal,
        needs_grad and torch.is_grad_enabled(),
    )
    return y


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
    return _ops.q_shift(x, height, width, shift_pixel, float(channel_gamma), False, heads)


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
    check_token_shift(x, mixes, resolution, shift_pixel, channel_gamma, mode, heads)
    dtype = accumulation_dtype(x.dtype)
    if isinstance(mixes, Tensor):
        mixes = mixes.to(dtype).contiguous()
    else:
        mixes = torch.stack([mix.reshape(-1).to(dtype) for mix in mixes])
    height, width = resolution if mode == 'q_shift' else (1, x.shape[1])
    gamma = 1 / 4 if channel_gamma is None else float(channel_gamma)
    return tuple(_ops.token_shift(x, mixes, height, width, shift_pixel, gamma, mode, heads))


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
    check_pointwise('squared_relu', x=x)
    if torch.compiler.is_compiling():
        return pointwise.squared_relu(x)
    return _ops.squared_relu(x)


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
    check_pointwise('sigmoid_gate', r=r, x=x)
    dtype = torch.promote_types(r.dtype, x.dtype)  # with autocast a layer norm may lie between them
    r, x = r.to(dtype), x.to(dtype)
    if torch.compiler.is_compiling():
        return pointwise.sigmoid_gate(r, x)
    return _ops.sigmoid_gate(r, x)


# --- Kernels for devices without compiled ones ------------------------------------------------


@torch.library.impl(_lib, 'bi_wkv_forward', 'CompositeExplicitAutograd')
def _bi_wkv_forward(w, u, k, v, causal, save):
    backends.warn_if_slow(k.device)
    y_acc, z = scan.forward(w, u, k, v, causal)
    y = y_acc.to(k.dtype)
    if not save:
        return y, y.new_empty(0), z.new_empty(0)
    y_residual = (y_acc - y).to(k.dtype) if k.dtype in _HALF else y.new_empty(0)
    return y, y_residual, z


@torch.library.impl(_lib, 'bi_wkv_backward', 'CompositeExplicitAutograd')
def _bi_wkv_backward(gy, w, u, k, v, y, y_residual, z, causal):
    backends.warn_if_slow(k.device)
    y_acc = y.to(w.dtype)
    if k.dtype in _HALF:
        y_acc = y_acc + y_residual
    gw, gu, gk, gv = scan.backward(gy, w, u, k, v, y_acc, z, causal)
    return gw, gu, gk.to(k.dtype), gv.to(v.dtype)


@torch.library.impl(_lib, 'q_shift', 'CompositeExplicitAutograd')
def _q_shift(x, height, width, shift_pixel, channel_gamma, reverse, heads=1):
    backends.warn_if_slow(x.device)
    return shift.shift_slices(
        x, height, width, shift_pixel, channel_gamma, heads=heads, reverse=reverse
    )


@torch.library.impl(_lib, 'token_shift', 'CompositeExplicitAutograd')
def _token_shift(x, mixes, *args):
    backends.warn_if_slow(x.device)
    return shift.forward(x, mixes, *args)


@torch.library.impl(_lib, 'token_shift_backward', 'CompositeExplicitAutograd')
def _token_shift_backward(grads, x, mixes, *args):
    backends.warn_if_slow(x.device)
    return shift.backward(grads, x, mixes, *args)


@torch.library.impl(_lib, 'squared_relu', 'CompositeExplicitAutograd')
def _squared_relu(x):
    backends.warn_if_slow(x.device)
    return pointwise.squared_relu(x).contiguous()


@torch.library.impl(_lib, 'squared_relu_backward', 'CompositeExplicitAutograd')
def _squared_relu_backward(grad, x):
    return pointwise.squared_relu_backward(grad, x).contiguous()


@torch.library.impl(_lib, 'sigmoid_gate', 'CompositeExplicitAutograd')
def _sigmoid_gate(r, x):
    backends.warn_if_slow(x.device)
    return pointwise.sigmoid_gate(r, x).contiguous()


@torch.library.impl(_lib, 'sigmoid_gate_backward', 'CompositeExplicitAutograd')
def _sigmoid_gate_backward(grad, r, x):
    gr, gx = pointwise.sigmoid_gate_backward(grad, r, x)
    return gr.contiguous(), gx.contiguous()


SCAN_KERNELS = {
    'bi_wkv_forward': _bi_wkv_forward,
    'bi_wkv_backward': _bi_wkv_backward,
    'q_shift': _q_shift,
    'token_shift': _token_shift,
    'token_shift_backward': _token_shift_backward,
    'squared_relu': _squared_relu,
    'squared_relu_backward': _squared_relu_backward,
    'sigmoid_gate': _sigmoid_gate,
    'sigmoid_gate_backward': _sigmoid_gate_backward,
}


# --- Shapes and dtypes of results, for torch.compile and torch.export --------------------------


@torch.library.register_fake('vrwkv_ops::bi_wkv_forward', lib=_lib)
def _(w, u, k, v, causal, save):
    y = k.new_empty(k.shape)
    y_residual = k.new_empty(k.shape if save and k.dtype in _HALF else (0,))
    z = w.new_empty(k.shape if save else (0,))
    return y, y_residual, z


@torch.library.register_fake('vrwkv_ops::bi_wkv_backward', lib=_lib)
def _(gy, w, u, k, v, y, y_residual, z, causal):
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake('vrwkv_ops::q_shift', lib=_lib)
def _(x, height, width, shift_pixel, channel_gamma, reverse, heads=1):
    return x.new_empty(x.shape)


@torch.library.register_fake('vrwkv_ops::token_shift', lib=_lib)
def _(x, mixes, height, width, shift_pixel, channel_gamma, mode, heads=1):
    return [x.new_empty(x.shape) for _ in range(mixes.shape[0])]


@torch.library.register_fake('vrwkv_ops::token_shift_backward', lib=_lib)
def _(grads, x, mixes, height, width, shift_pixel, channel_gamma, mode, heads=1):
    return x.new_empty(x.shape), mixes.new_empty(mixes.shape)


@torch.library.register_fake('vrwkv_ops::squared_relu', lib=_lib)
def _(x):
    return x.new_empty(x.shape)


@torch.library.register_fake('vrwkv_ops::squared_relu_backward', lib=_lib)
def _(grad, x):
    return x.new_empty(x.shape)


@torch.library.register_fake('vrwkv_ops::sigmoid_gate', lib=_lib)
def _(r, x):
    return x.new_empty(x.shape)


@torch.library.register_fake('vrwkv_ops::sigmoid_gate_backward', lib=_lib)
def _(grad, r, x):
    return r.new_empty(r.shape), x.new_empty(x.shape)


# --- Autograd ---------------------------------------------------------------------------------


def _bi_wkv_setup_context(ctx, inputs, output):
    w, u, k, v, causal, save = inputs
    y, y_residual, z = output
    ctx.mark_non_differentiable(y_residual, z)
    ctx.set_materialize_grads(False)
    ctx.causal, ctx.save = causal, save
    if save:
        ctx.save_for_backward(w, u, k, v, y, y_residual, z)


def _bi_wkv_autograd(ctx, gy, *_):
    if not ctx.save:
        raise RuntimeError('vrwkv_ops::bi_wkv_forward needs save=True for a backward pass')
    if gy is None:
        return (None,) * 6
    return (*_ops.bi_wkv_backward(gy, *ctx.saved_tensors, ctx.causal), None, None)


torch.library.register_autograd(
    'vrwkv_ops::bi_wkv_forward', _bi_wkv_autograd, setup_context=_bi_wkv_setup_context, lib=_lib
)


def _differentiable_once(name: str) -> None:
    """Make the gradient of the operator ``name`` raise an error when it is differentiated."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f'{name} is differentiable once only. Call backward or torch.autograd.grad without '
            f'create_graph=True, or use vrwkv_ops.reference.{name}_reference for higher derivatives'
        )

    torch.library.register_autograd(f'vrwkv_ops::{name}_backward', refuse, lib=_lib)


_differentiable_once('bi_wkv')


def _q_shift_setup_context(ctx, inputs, output):
    ctx.shift = inputs[1:]


def _q_shift_autograd(ctx, gy):
    # The adjoint of a shift is the reverse shift.
    *args, reverse, heads = ctx.shift
    return (_ops.q_shift(gy, *args, not reverse, heads), *(None,) * len(ctx.shift))


torch.library.register_autograd(
    'vrwkv_ops::q_shift', _q_shift_autograd, setup_context=_q_shift_setup_context, lib=_lib
)


def _token_shift_setup_context(ctx, inputs, output):
    x, mixes, *ctx.shift = inputs
    ctx.save_for_backward(x, mixes)


def _token_shift_autograd(ctx, grads):
    gx, gmixes = _ops.token_shift_backward(grads, *ctx.saved_tensors, *ctx.shift)
    # The dispatcher leaves out arguments that have their default value.
    return (gx, gmixes, *(None,) * (len(ctx.needs_input_grad) - 2))


torch.library.register_autograd(
    'vrwkv_ops::token_shift',
    _token_shift_autograd,
    setup_context=_token_shift_setup_context,
    lib=_lib,
)
_differentiable_once('token_shift')


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _squared_relu_autograd(ctx, grad):
    return _ops.squared_relu_backward(grad, *ctx.saved_tensors)


def _sigmoid_gate_autograd(ctx, grad):
    return _ops.sigmoid_gate_backward(grad, *ctx.saved_tensors)


for _name, _autograd in (
    ('squared_relu', _squared_relu_autograd),
    ('sigmoid_gate', _sigmoid_gate_autograd),
):
    torch.library.register_autograd(
        f'vrwkv_ops::{_name}', _autograd, setup_context=_save_inputs, lib=_lib
    )
    _differentiable_once(_name)


# --- Autocast: k and v get its dtype, w and u keep the accumulation dtype -------------------


def _autocast_rule(device_type: str):
    def kernel(w, u, k, v, causal, save):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            if k.dtype != torch.float64:
                k, v = k.to(dtype), v.to(dtype)
            return _ops.bi_wkv_forward(w, u, k, v, causal, save)

    return kernel


for _device_type, _key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
    _lib.impl('bi_wkv_forward', _autocast_rule(_device_type), _key)

backends.load()
if backends.triton_serves_gpus():
    triton.serve('CUDA', SCAN_KERNELS)
