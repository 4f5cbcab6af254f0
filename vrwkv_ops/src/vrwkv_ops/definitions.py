"""The table of operators: schemas, PyTorch kernels, fakes, autograd and autocast rules.

``csrc/dispatch.cpp`` has the schemas, autograd and autocast rules too, and the compiled library
registers them. Then this table adds the kernels for other devices and the fakes. Without the
library the table defines everything. A test compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vrwkv_ops import backends, deform, pointwise, scan, shift, wkv6
from vrwkv_ops.checks import accumulation_dtype, check_bi_wkv, check_pointwise, check_token_shift

_HALF = (torch.float16, torch.bfloat16)
_LIBRARIES = []  # a library that is garbage-collected removes its kernels


@dataclass(frozen=True)
class Operator:
    """An operator of the dispatcher.

    Attributes:
        schema: Its schema.
        kernel: PyTorch code for devices without compiled kernels.
        fake: Returns empty results; None for an operator that is composed of others.
        setup_context: As for ``torch.library.register_autograd``.
        backward: Likewise, with the namespace of the operators before its arguments. An operator
            ``NAME_backward`` has none and refuses a second derivative.
        autocast: Returns the arguments that autocast converts: ``autocast(dtype, *arguments)``.
    """

    schema: str
    kernel: Callable
    fake: Callable | None = None
    setup_context: Callable | None = None
    backward: Callable | None = None
    autocast: Callable | None = None

    @property
    def name(self) -> str:
        """Its name in the namespace."""
        return self.schema.partition('(')[0]

    @property
    def is_composite(self) -> bool:
        """Whether it is composed of other operators, which have the rules."""
        return self.fake is None

    def run_kernel(self, *args):
        """Run the PyTorch code, after a warning if compiled kernels would be faster."""
        backends.warn_if_slow(next(x for x in args if isinstance(x, Tensor)).device)
        return self.kernel(*args)


# --- Bi-WKV -----------------------------------------------------------------------------------


def _bi_wkv(ops, w, u, k, v, causal):
    check_bi_wkv(w, u, k, v, causal)
    dtype = accumulation_dtype(k.dtype)
    needs_grad = w.requires_grad or u.requires_grad or k.requires_grad or v.requires_grad
    save = needs_grad and torch.is_grad_enabled()
    w, u = w.to(dtype).contiguous(), u.to(dtype).contiguous()
    return ops.bi_wkv_forward(w, u, k, v, causal, save)[0]


def _bi_wkv_forward(w, u, k, v, causal, save):
    y_acc, z = scan.forward(w, u, k, v, causal)
    y = y_acc.to(k.dtype)
    if not save:
        return y, y.new_empty(0), z.new_empty(0)
    y_residual = (y_acc - y).to(k.dtype) if k.dtype in _HALF else y.new_empty(0)
    return y, y_residual, z


def _bi_wkv_forward_fake(w, u, k, v, causal, save):
    y = k.new_empty(k.shape)
    y_residual = k.new_empty(k.shape if save and k.dtype in _HALF else (0,))
    z = w.new_empty(k.shape if save else (0,))
    return y, y_residual, z


def _bi_wkv_forward_setup_context(ctx, inputs, output):
    w, u, k, v, causal, save = inputs
    y, y_residual, z = output
    ctx.mark_non_differentiable(y_residual, z)
    ctx.set_materialize_grads(False)
    ctx.causal, ctx.save = causal, save
    if save:
        ctx.save_for_backward(w, u, k, v, y, y_residual, z)


def _bi_wkv_forward_autograd(ops, ctx, gy, *_):
    if not ctx.save:
        raise RuntimeError('vrwkv_ops::bi_wkv_forward needs save=True for a backward pass')
    if gy is None:
        return (None,) * 6
    return (*ops.bi_wkv_backward(gy, *ctx.saved_tensors, ctx.causal), None, None)


def _bi_wkv_forward_autocast(dtype, w, u, k, v, *options):
    """Convert k and v; w and u keep the accumulation dtype."""
    if k.dtype != torch.float64:
        k, v = k.to(dtype), v.to(dtype)
    return w, u, k, v, *options


def _bi_wkv_backward(gy, w, u, k, v, y, y_residual, z, causal):
    y_acc = y.to(w.dtype)
    if k.dtype in _HALF:
        y_acc = y_acc + y_residual
    gw, gu, gk, gv = scan.backward(gy, w, u, k, v, y_acc, z, causal)
    return gw, gu, gk.to(k.dtype), gv.to(v.dtype)


def _bi_wkv_backward_fake(gy, w, u, k, v, y, y_residual, z, causal):
    return _empty(w), _empty(u), _empty(k), _empty(v)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# --- Bi-WKV6 ----------------------------------------------------------------------------------


def _bi_wkv6_backward(gy, *args):
    with torch.autocast(gy.device.type, enabled=False):  # backward() may run under autocast
        return wkv6.backward(gy, *args)


def _bi_wkv6_setup_context(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _bi_wkv6_forward_autograd(ops, ctx, gy):
    return (*ops.bi_wkv6_backward(gy, *ctx.saved_tensors, ctx.causal), None)


def _bi_wkv6_forward_autocast(dtype, *args):
    """Convert to float32: results grow with the number of tokens."""
    if args[2].dtype == torch.float64:
        return args
    return (*(x.float() for x in args[:-1]), args[-1])


# --- Token shifts -----------------------------------------------------------------------------


def _q_shift(x, height, width, shift_pixel, channel_gamma, reverse, heads=1):
    return shift.shift_slices(
        x, height, width, shift_pixel, channel_gamma, heads=heads, reverse=reverse
    )


def _q_shift_setup_context(ctx, inputs, output):
    ctx.shift = inputs[1:]


def _q_shift_autograd(ops, ctx, gy):
    # The adjoint of a shift is the reverse shift.
    *args, reverse, heads = ctx.shift
    return (ops.q_shift(gy, *args, not reverse, heads), *(None,) * len(ctx.shift))


def _token_shift(ops, x, mixes, height, width, shift_pixel, channel_gamma, mode, heads=1):
    shift_args = shift_pixel, channel_gamma, mode, heads
    check_token_shift(x, mixes, (height, width), *shift_args)
    joined = torch.cat([mix.reshape(1, -1) for mix in mixes]).to(accumulation_dtype(x.dtype))
    return ops.token_shift_forward(x, joined, height, width, *shift_args)


def _token_shift_forward_setup_context(ctx, inputs, output):
    x, mixes, *ctx.shift = inputs
    ctx.save_for_backward(x, mixes)


def _token_shift_forward_autograd(ops, ctx, grads):
    gx, gmixes = ops.token_shift_backward(grads, *ctx.saved_tensors, *ctx.shift)
    # The dispatcher leaves out arguments that have their default value.
    return (gx, gmixes, *(None,) * (len(ctx.needs_input_grad) - 2))


# --- Multi-scale deformable attention ---------------------------------------------------------


def _ms_deform_attn_fake(value, shapes, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _ms_deform_attn_setup_context(ctx, inputs, output):
    value, ctx.shapes, *points = inputs
    ctx.save_for_backward(value, *points)


def _ms_deform_attn_autograd(ops, ctx, grad):
    value, *points = ctx.saved_tensors
    gvalue, *gpoints = ops.ms_deform_attn_backward(grad, value, ctx.shapes, *points)
    return (gvalue, None, *gpoints)


# --- Element-wise functions -------------------------------------------------------------------


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _squared_relu(x):
    check_pointwise('squared_relu', x=x)
    return pointwise.squared_relu(x).contiguous()


def _squared_relu_autograd(ops, ctx, grad):
    return ops.squared_relu_backward(grad, *ctx.saved_tensors)


def _squared_relu_backward(grad, x):
    return pointwise.squared_relu_backward(grad, x).contiguous()


def _sigmoid_gate(r, x):
    check_pointwise('sigmoid_gate', r=r, x=x)
    return pointwise.sigmoid_gate(r, x).contiguous()


def _sigmoid_gate_fake(r, x):
    check_pointwise('sigmoid_gate', r=r, x=x)
    return _empty(x)


def _sigmoid_gate_autograd(ops, ctx, grad):
    return ops.sigmoid_gate_backward(grad, *ctx.saved_tensors)


def _sigmoid_gate_backward(grad, r, x):
    gr, gx = pointwise.sigmoid_gate_backward(grad, r, x)
    return gr.contiguous(), gx.contiguous()


# --- The table --------------------------------------------------------------------------------

OPERATORS = (
    Operator('bi_wkv(Tensor w, Tensor u, Tensor k, Tensor v, bool causal) -> Tensor', _bi_wkv),
    Operator(
        'bi_wkv_forward(Tensor w, Tensor u, Tensor k, Tensor v, bool causal, bool save)'
        ' -> (Tensor y, Tensor y_residual, Tensor z)',
        _bi_wkv_forward,
        _bi_wkv_forward_fake,
        _bi_wkv_forward_setup_context,
        _bi_wkv_forward_autograd,
        _bi_wkv_forward_autocast,
    ),
    Operator(
        'bi_wkv_backward(Tensor gy, Tensor w, Tensor u, Tensor k, Tensor v, Tensor y,'
        ' Tensor y_residual, Tensor z, bool causal)'
        ' -> (Tensor gw, Tensor gu, Tensor gk, Tensor gv)',
        _bi_wkv_backward,
        _bi_wkv_backward_fake,
    ),
    Operator(
        'bi_wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, bool causal) -> Tensor',
        wkv6.forward,
        lambda r, k, v, *_: _empty(v),
        _bi_wkv6_setup_context,
        _bi_wkv6_forward_autograd,
        _bi_wkv6_forward_autocast,
    ),
    Operator(
        'bi_wkv6_backward(Tensor gy, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, bool causal)'
        ' -> (Tensor gr, Tensor gk, Tensor gv, Tensor gw, Tensor gu)',
        _bi_wkv6_backward,
        lambda gy, *inputs: tuple(map(_empty, inputs[:5])),
    ),
    Operator(
        'q_shift(Tensor x, SymInt height, SymInt width, int shift_pixel, float channel_gamma,'
        ' bool reverse, int heads=1) -> Tensor',
        _q_shift,
        lambda x, *_: _empty(x),
        _q_shift_setup_context,
        _q_shift_autograd,
    ),
    Operator(
        'token_shift(Tensor x, Tensor[] mixes, SymInt height, SymInt width, int shift_pixel,'
        ' float channel_gamma, str mode, int heads=1) -> Tensor[]',
        _token_shift,
    ),
    Operator(
        'token_shift_forward(Tensor x, Tensor mixes, SymInt height, SymInt width, int shift_pixel,'
        ' float channel_gamma, str mode, int heads=1) -> Tensor[]',
        shift.forward,
        lambda x, mixes, *_: [_empty(x) for _ in range(mixes.shape[0])],
        _token_shift_forward_setup_context,
        _token_shift_forward_autograd,
    ),
    Operator(
        'token_shift_backward(Tensor[] grads, Tensor x, Tensor mixes, SymInt height, SymInt width,'
        ' int shift_pixel, float channel_gamma, str mode, int heads=1)'
        ' -> (Tensor gx, Tensor gmixes)',
        shift.backward,
        lambda grads, x, mixes, *_: (_empty(x), _empty(mixes)),
    ),
    Operator(
        'ms_deform_attn(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor',
        deform.forward,
        _ms_deform_attn_fake,
        _ms_deform_attn_setup_context,
        _ms_deform_attn_autograd,
    ),
    Operator(
        'ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations,'
        ' Tensor weights) -> (Tensor gvalue, Tensor glocations, Tensor gweights)',
        deform.backward,
        lambda grad, value, shapes, *points: (_empty(value), *map(_empty, points)),
    ),
    Operator(
        'squared_relu(Tensor x) -> Tensor',
        _squared_relu,
        _empty,
        _save_inputs,
        _squared_relu_autograd,
    ),
    Operator(
        'squared_relu_backward(Tensor grad, Tensor x) -> Tensor',
        _squared_relu_backward,
        lambda grad, x: _empty(x),
    ),
    Operator(
        'sigmoid_gate(Tensor r, Tensor x) -> Tensor',
        _sigmoid_gate,
        _sigmoid_gate_fake,
        _save_inputs,
        _sigmoid_gate_autograd,
    ),
    Operator(
        'sigmoid_gate_backward(Tensor grad, Tensor r, Tensor x) -> (Tensor gr, Tensor gx)',
        _sigmoid_gate_backward,
        lambda grad, r, x: (_empty(r), _empty(x)),
    ),
)


# --- Registration -----------------------------------------------------------------------------


def complete(namespace: str) -> None:
    """Register the operators of a namespace, as far as no compiled library did."""
    library = torch.library.Library(namespace, 'FRAGMENT')
    _LIBRARIES.append(library)
    for op in OPERATORS:
        if not hasattr(getattr(torch.ops, namespace), op.name):
            library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
            _register_rules(op, library)
        if not op.is_composite:
            library.impl(op.name, op.run_kernel, 'CompositeExplicitAutograd')
            torch.library.register_fake(f'{namespace}::{op.name}', op.fake, lib=library)


def _register_rules(op: Operator, library: torch.library.Library) -> None:
    """Register autograd and autocast rules, which the compiled library has too."""
    ops, name = getattr(torch.ops, library.ns), f'{library.ns}::{op.name}'
    if op.is_composite:
        library.impl(op.name, partial(op.kernel, ops), 'CompositeImplicitAutograd')
    elif op.name.endswith('_backward'):
        torch.library.register_autograd(name, _refuse(op.name), lib=library)
    else:
        torch.library.register_autograd(
            name, partial(op.backward, ops), setup_context=op.setup_context, lib=library
        )
    if op.autocast is not None:
        for device_type, key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
            kernel = _autocast_kernel(getattr(ops, op.name), op.autocast, device_type)
            library.impl(op.name, kernel, key)


def _refuse(backward: str) -> Callable:
    """Return the autograd rule of a gradient, which raises an error when it is called."""
    name = backward.removesuffix('_backward')

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f'{name} is differentiable once only. Call backward or torch.autograd.grad without '
            f'create_graph=True, or use vrwkv_ops.reference.{name}_reference for higher derivatives'
        )

    return refuse


def _autocast_kernel(op: Callable, convert: Callable, device_type: str) -> Callable:
    def kernel(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*convert(dtype, *args))

    return kernel
