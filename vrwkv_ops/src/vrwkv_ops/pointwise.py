"""Element-wise functions of the layers and their gradients in plain PyTorch."""

import torch
from torch import Tensor

from vrwkv_ops.checks import accumulation_dtype


def squared_relu(x: Tensor) -> Tensor:
    """Compute :func:`vrwkv_ops.squared_relu`."""
    positive = torch.relu(x)
    return positive * positive  # CUDA's autocast would compute square() in float32


def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of ``x`` through :func:`squared_relu`, in the dtype of ``x``."""
    return (2 * grad.to(accumulation_dtype(x.dtype)) * torch.relu(x)).to(x.dtype)


def sigmoid_gate(r: Tensor, x: Tensor) -> Tensor:
    """Compute :func:`vrwkv_ops.sigmoid_gate`."""
    dtype = accumulation_dtype(x.dtype)
    return (torch.sigmoid(r.to(dtype)) * x).to(x.dtype)


def sigmoid_gate_backward(grad: Tensor, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``r`` and ``x`` through :func:`sigmoid_gate`, in their dtypes."""
    dtype = accumulation_dtype(x.dtype)
    r, grad = r.to(dtype), grad.to(dtype)
    gx = grad * torch.sigmoid(r)
    return (gx * x * torch.sigmoid(-r)).to(x.dtype), gx.to(x.dtype)
