"""The calls of the projects with copies of upstream's kernels, against the dense formulas."""

import pytest
import torch

from vrwkv_ops import compat

from .dense_bi_wkv import dense_with_gradients
from .dense_bi_wkv6 import dense_bi_wkv6
from .test_bi_wkv6 import make, run


def bi_wkv_problem():
    generator = torch.Generator().manual_seed(0)
    w, u = (torch.randn(48, generator=generator) / 40 for _ in range(2))
    k, v, gy = (torch.randn(2, 40, 48, generator=generator) for _ in range(3))
    return (w, u, k, v), gy


@pytest.mark.parametrize('name', ['RUN_CUDA', 'RUN_BiWKV4'])
@pytest.mark.parametrize('sizes', [(), (2, 40, 48)])
def test_bi_wkv(name, sizes):
    """The new and the old form, with gradients and a transposed key; float32 rounding."""
    inputs, gy = bi_wkv_problem()
    truth = dense_with_gradients(*inputs, gy)
    w, u, k, v = (x.requires_grad_() for x in inputs)
    y = getattr(compat, name)(*sizes, w, u, k.mT.contiguous().mT, v)
    results = [y.detach(), *torch.autograd.grad(y, (w, u, k, v), gy)]
    for found, expected in zip(results, truth, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_mixed_dtypes():
    """Half keys and float32 values, as under a partial autocast."""
    (w, u, k, v), _ = bi_wkv_problem()
    y = compat.RUN_CUDA(w, u, k.bfloat16(), v)
    assert y.dtype == torch.float32
    assert torch.equal(y, compat.RUN_CUDA(w, u, k.bfloat16().float(), v))


@pytest.mark.parametrize('flat', [False, True])
def test_bi_wkv6(flat):
    inputs, gy = make(2, 20, 2, 16)
    truth = run(dense_bi_wkv6, inputs, gy)

    def call(r, k, v, w, u):
        return compat.RUN_CUDA_RWKV6(2, 20, 32, 2, r, k, v, w, u.flatten() if flat else u)

    for found, expected in zip(run(call, inputs, gy), truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_wrong_calls():
    (w, u, k, v), _ = bi_wkv_problem()
    with pytest.raises(TypeError, match=r'takes \(w, u, k, v\) or .*, got 5'):
        compat.RUN_CUDA(2, w, u, k, v)
    with pytest.raises(ValueError, match=r"B, T, C are \(1, 40, 48\), but 'k' is \(2, 40, 48\)"):
        compat.RUN_CUDA(1, 40, 48, w, u, k, v)
    with pytest.raises(ValueError, match=r'5 heads must divide C = 48'):
        compat.RUN_CUDA_RWKV6(2, 40, 48, 5, k, k, v, v, u)
    with pytest.raises(ValueError, match=r'0 heads must divide C = 48'):
        compat.RUN_CUDA_RWKV6(2, 40, 48, 0, k, k, v, v, u)
    with pytest.raises(ValueError, match="'w' must have the shape"):
        compat.RUN_CUDA_RWKV6(2, 40, 48, 6, k, k, v, v[:, :5], u)
    with pytest.raises(TypeError, match=r"'k' must be a torch\.Tensor, got NoneType"):
        compat.RUN_CUDA(w, u, None, v)
    with pytest.raises(TypeError, match=r"'u' must be a torch\.Tensor, got NoneType"):
        compat.RUN_CUDA_RWKV6(2, 40, 48, 6, k, k, v, v, None)
