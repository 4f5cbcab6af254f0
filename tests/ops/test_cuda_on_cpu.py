"""The arithmetic of the CUDA kernels, compiled for the CPU: what a machine without a GPU shows."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from vrwkv_ops import bi_wkv

from .dense_bi_wkv import dense_with_gradients

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / 'vrwkv_ops' / 'csrc'


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp('cuda_on_cpu') / 'library.so'
    includes = [f'-I{path}' for path in (CSRC, *cpp_extension.include_paths())]
    command = [cpp_extension.get_cxx_compiler(), '-std=c++20', '-O1', '-shared', '-fPIC']
    command += [*includes, str(HERE / 'cuda_on_cpu.cpp'), '-o', str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return ctypes.CDLL(str(file))


def run(library, w, u, k, v, gy, causal):
    """Output and gradients of w, u, k and v, as vrwkv_ops.bi_wkv computes them on CUDA."""
    sizes = (ctypes.c_int64 * 3)(*k.shape)
    half = k.dtype == torch.bfloat16
    name = 'bfloat16' if half else 'float32'
    y, gk, gv = (torch.full_like(k, torch.nan) for _ in range(3))
    residual = torch.full_like(k, torch.nan) if half else None
    z, gw, gu = (torch.full(x.shape, torch.nan) for x in (k, w, u))

    def call(direction, *tensors):
        pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
        getattr(library, f'{name}_{direction}')(sizes, ctypes.c_int(causal), *pointers)

    call('forward', w, u, k, v, y, residual, z)
    call('backward', gy, w, u, k, v, y, residual, z, gw, gu, gk, gv)
    return y, gw, gu, gk, gv


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_total'),
    [(1, 3, 0), (31, 30, 30), (33, 30, -30), (196, 8, 5), (1000, 30, 30), (1024, 30, -30)],
)
def test_equals_dense(library, tokens, k_max, w_total, dtype, causal):
    """Fewer chunks than segments and more, a last chunk that is shorter; decay and growth."""
    generator = torch.Generator().manual_seed(tokens)
    k, v, gy = torch.randn(3, 2, tokens, 3, generator=generator)
    if dtype != torch.float32:  # as in test_bi_wkv.py
        k_max, w_total = min(k_max, 8), math.copysign(min(abs(w_total), 8), w_total)
    k = (k * k_max / 3).clamp(-k_max, k_max)
    k, v, gy = (x.to(dtype).contiguous() for x in (k, v, gy))
    w = torch.tensor([1.0, 0.0, -0.5]) * w_total / tokens
    u = torch.randn(3, generator=generator)
    results = run(library, w, u, k, v, gy, causal)
    truths = dense_with_gradients(w, u, k, v, gy, causal)
    # The bars of test_bi_wkv.py: float32's, and rounding once for bfloat16.
    for name, got, expected in zip(('y', 'gw', 'gu', 'gk', 'gv'), results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if dtype == torch.float32 or name in ('y', 'gv') else 3e-5
        scale = max(expected.norm(), 0.1 * gy.double().norm()) if tokens == 1 else expected.norm()
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * scale, name


def test_long_sequence(library):
    """Many chunks in each segment; against the CPU kernels, which others hold to float64."""
    generator = torch.Generator().manual_seed(0)
    k, v, gy = torch.randn(3, 1, 20000, 2, generator=generator)
    w, u = torch.tensor([3.0, -3.0]) / 20000, torch.zeros(2)
    results = run(library, w, u, k, v, gy, False)
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves)
    expected = (y, *torch.autograd.grad(y, leaves, gy))
    for got, want in zip(results, expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
