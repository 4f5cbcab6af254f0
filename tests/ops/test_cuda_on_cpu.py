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


NAMES = ('y', 'gw', 'gu', 'gk', 'gv')


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp('cuda_on_cpu') / 'library.so'
    includes = [f'-I{path}' for path in (CSRC, *cpp_extension.include_paths())]
    command = [cpp_extension.get_cxx_compiler(), '-std=c++20', '-O1', '-shared', '-fPIC']
    command += [*includes, str(HERE / 'cuda_on_cpu.cpp'), '-o', str(file)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return ctypes.CDLL(str(file))


def run(library, w, u, k, v, gy, causal, warps=16):
    """Output and gradients of w, u, k and v, as vrwkv_ops.bi_wkv computes them on CUDA.

    Also how many tiles the careful way took, forward and backward.
    """
    sizes = (ctypes.c_int64 * 3)(*k.shape)
    half = k.dtype == torch.bfloat16
    name = 'bfloat16' if half else 'float32'
    y, gk, gv = (torch.full_like(k, torch.nan) for _ in range(3))
    residual = torch.full_like(k, torch.nan) if half else None
    z, gw, gu = (torch.full(x.shape, torch.nan) for x in (k, w, u))

    def call(direction, *tensors):
        pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
        function = getattr(library, f'{name}_{direction}')
        function(sizes, ctypes.c_int(warps), ctypes.c_int(causal), *pointers)
        return library.take_careful_tiles()

    careful = (
        call('forward', w, u, k, v, y, residual, z),
        call('backward', gy, w, u, k, v, y, residual, z, gw, gu, gk, gv),
    )
    return (y, gw, gu, gk, gv), careful


def cpu_errors(w, u, k, v, gy, causal, truths):
    """Norms of the errors of the CPU kernels."""
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves, causal=causal)
    results = (y.detach(), *torch.autograd.grad(y, leaves, gy))
    errors = ((x.double() - truth).norm() for x, truth in zip(results, truths, strict=True))
    return dict(zip(NAMES, errors, strict=True))


# Tokens, largest key, decay over the sequence, warps of a block, and whether weights lie too far
# apart for one exponent, in the forward pass and in the backward one.
CASES = {
    'one token': (1, 3, 0, 16, (False, False)),
    'shorter chunk': (31, 8, 8, 16, (False, False)),
    'one tile': (196, 8, 5, 16, (False, False)),
    'full tile': (256, 8, -5, 16, (False, False)),
    'shorter tile': (261, 3, 5, 16, (False, False)),
    'one warp': (45, 3, -5, 1, (False, False)),
    'more tiles than segments': (1100, 8, 30, 4, (False, False)),
    'growth': (1024, 8, -30, 8, (False, False)),
    'far keys': (1000, 30, 30, 8, (True, False)),
    'far keys, growth': (33, 30, -30, 16, (True, False)),
}


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_total', 'warps', 'is_far'), CASES.values(), ids=CASES
)
def test_equals_dense(library, tokens, k_max, w_total, warps, is_far, dtype, causal):
    generator = torch.Generator().manual_seed(tokens)
    k, v, gy = torch.randn(3, 2, tokens, 3, generator=generator)
    if dtype != torch.float32:  # as in test_bi_wkv.py
        w_total = math.copysign(min(abs(w_total), 8), w_total)
    k = (k * k_max / 3).clamp(-k_max, k_max)
    k, v, gy = (x.to(dtype).contiguous() for x in (k, v, gy))
    w = torch.tensor([1.0, 0.0, -0.5]) * w_total / tokens
    u = torch.randn(3, generator=generator)
    results, careful = run(library, w, u, k, v, gy, causal, warps)
    assert tuple(count > 0 for count in careful) == is_far
    truths = dense_with_gradients(w, u, k, v, gy, causal)
    of_cpu = cpu_errors(w, u, k, v, gy, causal, truths)
    # The bars of test_bi_wkv.py: float32's, and rounding once for bfloat16.
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if dtype == torch.float32 or name in ('y', 'gv') else 3e-5
        scale = max(expected.norm(), 0.1 * gy.double().norm()) if tokens == 1 else expected.norm()
        bar = bar * scale
        if any(is_far) and name == 'gw':  # a sum that cancels: where float32 leaves the CPU's
            bar = max(bar, 2 * of_cpu[name])
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar, name


EXTREMES = {
    'fast decay': (500, 3, 2000, 0, (True, True)),
    'fast growth': (500, 3, -2000, 0, (True, True)),
    'at the limits of one exponent': (256, 3, 330, 0, (False, False)),
    'growth at the limits of one exponent': (256, 3, -330, 0, (False, False)),
    'large bonus': (196, 3, 5, 30, (False, True)),
    'small bonus': (196, 3, 5, -20, (False, False)),
}


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_total', 'bonus', 'is_far'), EXTREMES.values(), ids=EXTREMES
)
def test_equals_cpu_kernels(library, tokens, k_max, w_total, bonus, is_far, causal):
    """Beyond the range in which errors are held to 1e-5, errors are like those on the CPU."""
    generator = torch.Generator().manual_seed(tokens)
    k, v, gy = torch.randn(3, 2, tokens, 3, generator=generator)
    k = (k * k_max / 3).clamp(-k_max, k_max)
    w = torch.tensor([1.0, 0.0, -0.5]) * w_total / tokens
    u = torch.randn(3, generator=generator) + bonus
    results, careful = run(library, w, u, k, v, gy, causal, warps=4)
    assert tuple(count > 0 for count in careful) == is_far
    assert_like_cpu(results, w, u, k, v, gy, causal)


def test_jump_of_keys(library):
    """Products of e^k and e^(-z) that no float holds, of tokens that do not see each other."""
    generator = torch.Generator().manual_seed(0)
    k, v, gy = torch.randn(3, 1, 45, 3, generator=generator)
    k += torch.where(torch.arange(45) < 7, -60.0, 60.0).view(1, -1, 1)
    w, u = torch.tensor([0.1, 0.0, -0.1]), torch.zeros(3)
    results, careful = run(library, w, u, k, v, gy, True)
    assert careful == (1, 1)
    assert_like_cpu(results, w, u, k, v, gy, True)


def assert_like_cpu(results, w, u, k, v, gy, causal):
    truths = dense_with_gradients(w, u, k, v, gy, causal)
    of_cpu = cpu_errors(w, u, k, v, gy, causal, truths)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        # Roundings differ: within a factor of 2, or within the bar of the range that is held.
        assert (got.double() - expected).norm() <= max(2 * of_cpu[name], 1e-5 * expected.norm()), (
            name
        )


def test_long_sequence(library):
    """Many tiles in each segment; against the CPU kernels, which others hold to float64."""
    generator = torch.Generator().manual_seed(0)
    k, v, gy = torch.randn(3, 1, 20000, 2, generator=generator)
    w, u = torch.tensor([3.0, -3.0]) / 20000, torch.zeros(2)
    results, careful = run(library, w, u, k, v, gy, False, warps=8)
    assert careful == (0, 0)
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves)
    expected = (y, *torch.autograd.grad(y, leaves, gy))
    for got, want in zip(results, expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize('which', ['k', 'v'])
def test_not_a_number(library, which):
    """A NaN comes out of its own channel only."""
    generator = torch.Generator().manual_seed(0)
    k, v, gy = torch.randn(3, 1, 40, 3, generator=generator)
    {'k': k, 'v': v}[which][0, 7, 1] = torch.nan
    (y, _, _, gk, gv), _ = run(library, torch.rand(3), torch.zeros(3), k, v, gy, False)
    for x in (y, gk, gv):
        assert x[..., [0, 2]].isfinite().all()
    assert y[..., 1].isnan().all()


def test_largest_values(library):
    """Sums of nearly the largest floats stay finite; equal values come out as they are."""
    k, gy = torch.zeros(2, 1, 300, 3)
    v = torch.full_like(k, 0.99 * torch.finfo(torch.float32).max)
    w = torch.tensor([0.01, -0.05, -1.3])
    u = torch.tensor([0.0, 20.0, 0.0])
    (y, *_), careful = run(library, w, u, k, v, gy, False)
    assert careful[0] == 0
    # A few roundings of the sums.
    torch.testing.assert_close(y, v, rtol=2e-6, atol=0)
