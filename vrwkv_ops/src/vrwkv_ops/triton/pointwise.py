"""Element-wise operators in Triton; inputs that are not contiguous are copied."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import FLOAT_DTYPES

_BLOCK = 1024


@triton.jit
def _read(ptr, at, count, ACC: tl.constexpr):
    return tl.load(ptr + at, mask=at < count, other=0.0).to(ACC)


@triton.jit
def _write(ptr, at, count, value):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=at < count)


@triton.jit
def squared_relu_kernel(x_ptr, out_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Compute relu(x)^2."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _read(x_ptr, at, count, ACC)
    positive = tl.where(x < 0, 0.0, x)  # NaN stays
    _write(out_ptr, at, count, positive * positive)


@triton.jit
def squared_relu_backward_kernel(
    grad_ptr, x_ptr, gx_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute grad * 2 relu(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _read(x_ptr, at, count, ACC)
    _write(gx_ptr, at, count, _read(grad_ptr, at, count, ACC) * 2.0 * tl.where(x < 0, 0.0, x))


@triton.jit
def sigmoid_gate_kernel(r_ptr, x_ptr, out_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Compute sigmoid(r) * x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = 1.0 / (1.0 + tl.exp(-_read(r_ptr, at, count, ACC)))
    _write(out_ptr, at, count, gate * _read(x_ptr, at, count, ACC))


@triton.jit
def sigmoid_gate_backward_kernel(
    grad_ptr, r_ptr, x_ptr, gr_ptr, gx_ptr, count, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the gradients of r and x: sigmoid'(r) = sigmoid(r) sigmoid(-r)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = _read(r_ptr, at, count, ACC)
    gx = _read(grad_ptr, at, count, ACC) / (1.0 + tl.exp(-r))
    _write(gx_ptr, at, count, gx)
    _write(gr_ptr, at, count, gx * _read(x_ptr, at, count, ACC) / (1.0 + tl.exp(r)))


def _launch(kernel, inputs: tuple[Tensor, ...], outputs: int) -> list[Tensor]:
    """Run a kernel on all elements.

    Raises:
        RuntimeError: If inputs differ in shape, dtype or device, or hold no floats.
    """
    like = inputs[-1]
    for x in inputs:
        same = (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)
        if not same or x.dtype not in FLOAT_DTYPES:
            raise RuntimeError(
                f'vrwkv_ops: expected floats of one shape, dtype and device, got '
                f'{[(tuple(x.shape), x.dtype, str(x.device)) for x in inputs]}'
            )
    results = [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) for _ in range(outputs)
    ]
    count = like.numel()
    if count:
        acc = tl.float64 if like.dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(count, _BLOCK),)](
                *(x.contiguous() for x in inputs), *results, count, ACC=acc, BLOCK=_BLOCK
            )
    return results


def squared_relu(x: Tensor) -> Tensor:
    """Run ``vrwkv_ops::squared_relu``."""
    return _launch(squared_relu_kernel, (x,), 1)[0]


def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Run ``vrwkv_ops::squared_relu_backward``."""
    return _launch(squared_relu_backward_kernel, (grad, x), 1)[0]


def sigmoid_gate(r: Tensor, x: Tensor) -> Tensor:
    """Run ``vrwkv_ops::sigmoid_gate``."""
    return _launch(sigmoid_gate_kernel, (r, x), 1)[0]


def sigmoid_gate_backward(grad: Tensor, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run ``vrwkv_ops::sigmoid_gate_backward``."""
    gr, gx = _launch(sigmoid_gate_backward_kernel, (grad, r, x), 2)
    return gr, gx
