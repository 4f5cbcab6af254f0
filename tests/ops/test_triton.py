"""The Triton backend: in its interpreter, compiled for an absent GPU, and dispatched to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vrwkv_ops.triton import bi_wkv, pointwise
from vrwkv_ops.triton import token_shift as shift

TESTS = Path(__file__).parent / 'interpreted_triton.py'


def run_python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_kernels_in_the_interpreter():
    """Its switch must be set before Triton is imported: these tests have a process of their own."""
    options = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not cuda', str(TESTS))
    result = run_python(*options, TRITON_INTERPRET='1')
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout and 'skipped' not in result.stdout


# --- Compiled ahead of time for an H100 ---------------------------------------------------------

DTYPES = {'fp32': 'fp32', 'fp16': 'fp32', 'bf16': 'fp32', 'fp64': 'fp64'}
IN_ACCUMULATION_DTYPE = {'w', 'u', 'own', 'entering', 'z', 'gw', 'gu', 'mixes', 'gmixes'}
BOTH = dict(CAUSAL=False, BLOCK_T=64, BLOCK_C=16)
SHORT = dict(CAUSAL=True, BLOCK_T=256, BLOCK_C=4)
JOIN = dict(BLOCK_T=64, BLOCK_N=128, BLOCK_C=4)
# Triton makes constants of integers that are 1.
ONE_TILE = dict(T=1, C=1, tiles=1, CAUSAL=False, BLOCK_T=1, BLOCK_C=64)
ONE_BLOCK = dict(T=1, C=1, blocks=1, height=1, width=1, step=1, pieces=1, **shift._BLOCKS)
FLAT = dict(ACC=tl.float32, BLOCK=pointwise._BLOCK)
KERNELS = [
    (bi_wkv.wkv_own_states, BOTH),
    (bi_wkv.join_tiles, dict(FIELDS=bi_wkv.WKV_FIELDS.value, FIRST_DIRECTION=0, **JOIN)),
    (bi_wkv.wkv_outputs, dict(SAVE=True, RESIDUAL=None, **BOTH)),
    (bi_wkv.wkv_outputs, dict(SAVE=False, RESIDUAL=False, **SHORT)),
    (bi_wkv.grad_own_states, dict(RESIDUAL=None, **BOTH)),
    (bi_wkv.join_tiles, dict(FIELDS=bi_wkv.GRAD_FIELDS.value, FIRST_DIRECTION=1, **JOIN)),
    (bi_wkv.grad_outputs, dict(RESIDUAL=None, **BOTH)),
    (bi_wkv.grad_outputs, dict(RESIDUAL=None, **SHORT)),
    (bi_wkv.wkv_outputs, dict(SAVE=True, RESIDUAL=None, **ONE_TILE)),
    (bi_wkv.grad_outputs, dict(RESIDUAL=None, **ONE_TILE)),
    (shift.q_shift_kernel, shift._BLOCKS),
    (shift.token_shift_kernel, dict(N=3, **shift._BLOCKS)),
    (shift.token_shift_backward_kernel, dict(N=2, **shift._BLOCKS)),
    (shift.token_shift_backward_kernel, dict(N=3, **ONE_BLOCK)),
    (pointwise.squared_relu_kernel, FLAT),
    (pointwise.squared_relu_backward_kernel, FLAT),
    (pointwise.sigmoid_gate_kernel, FLAT),
    (pointwise.sigmoid_gate_backward_kernel, FLAT),
]


def compile_for_h100(kernel, dtype, constants):
    """PTX of a kernel; compiling needs no GPU."""
    half = dtype in ('fp16', 'bf16')
    constants = {name: half if x is None else x for name, x in constants.items()}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = 'constexpr'
        elif name.endswith('_ptr'):
            in_accumulation_dtype = name.removesuffix('_ptr') in IN_ACCUMULATION_DTYPE
            signature[name] = '*' + (DTYPES[dtype] if in_accumulation_dtype else dtype)
        else:  # sizes and strides, of more than 2^31 elements
            signature[name] = 'fp32' if name == 'headroom' else 'i64'
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target, options = GPUTarget('cuda', 90, 32), {'num_warps': bi_wkv._WARPS}
    return triton.compile(source, target=target, options=options).asm['ptx']


@pytest.mark.parametrize(
    ('kernel', 'constants'), KERNELS, ids=[f'{k.__name__}-{i}' for i, (k, _) in enumerate(KERNELS)]
)
def test_compiles_for_a_gpu(kernel, constants, tmp_path, monkeypatch):
    """What the interpreter does not see: types, and what Triton's compiler cannot do."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # compile indeed
    joins = kernel is bi_wkv.join_tiles  # in float64 for all
    once = joins or constants is FLAT or constants.get('CAUSAL') or 'T' in constants
    for dtype in ('bf16',) if once else ('bf16', 'fp64'):
        ptx = compile_for_h100(kernel, dtype, constants)
        assert '.target sm_90' in ptx
        assert 'atom' not in ptx  # results do not depend on who comes first
        # Rounds to nearest: the interpreter does not.
        assert 'cvt.rz.bf16' not in ptx


# --- Dispatch -----------------------------------------------------------------------------------

WITHOUT_KERNELS = """
import pathlib, sys, warnings
read_text = pathlib.Path.read_text
def hidden(self, *args, **kwargs):
    if self.name == '_build_info.json':
        raise FileNotFoundError
    return read_text(self, *args, **kwargs)
pathlib.Path.read_text = hidden
import torch
import vrwkv_ops
from vrwkv_ops import backends, ops, triton
"""


def test_triton_serves_gpus_without_compiled_kernels():
    script = (
        'assert backends.triton_serves_gpus()\n'
        'assert "triton.language" not in sys.modules  # not before it is needed\n'
        'for name in ops.SCAN_KERNELS:\n'
        '    has = torch._C._dispatch_has_kernel_for_dispatch_key\n'
        '    assert has(f"vrwkv_ops::{name}", "CUDA"), name\n'
        '    assert not has(f"vrwkv_ops::{name}", "CPU"), name\n'
    )
    result = run_python('-c', WITHOUT_KERNELS + script)
    assert result.returncode == 0, result.stderr


def test_all_operators_are_served():
    """Each operator of the schemas has a Triton kernel, and one of the scan."""
    script = (
        'names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names()'
        ' if n.startswith("vrwkv_ops::")}\n'
        'assert names == set(ops.SCAN_KERNELS) <= set(triton._operators()), names\n'
    )
    result = run_python('-c', WITHOUT_KERNELS + script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        # On CPU tensors without the interpreter, Triton finds no driver: any error will do.
        ('', 'they do not work here'),
        ('sys.modules["triton"] = None\n', 'ModuleNotFoundError'),
    ],
)
def test_the_scan_stands_in_where_triton_fails(fault, reason):
    """Shown on the CPU, where Triton cannot run: one warning, and right results."""
    script = fault + (
        'backends._loaded["cuda"] = backends._loaded["cpu"]\n'
        'backends._TITLES["cpu"] = "C++ kernels"\n'
        'triton.serve("CPU", ops.SCAN_KERNELS)\n'
        'from vrwkv_ops.reference import bi_wkv_reference\n'
        'w, u = torch.randn(2, 8)\n'
        'k, v = torch.randn(2, 2, 6, 8, requires_grad=True)\n'
        'with warnings.catch_warnings(record=True) as caught:\n'
        '    warnings.simplefilter("always")\n'
        '    y = vrwkv_ops.bi_wkv(w, u, vrwkv_ops.q_shift(k, (2, 3)), v)\n'
        '    y.sum().backward()\n'
        'caught = [c for c in caught if "pure-PyTorch" in str(c.message)]\n'
        'assert len(caught) == 1, caught\n'
        'torch.testing.assert_close(y, bi_wkv_reference(w, u, vrwkv_ops.q_shift(k, (2, 3)), v))\n'
        'print(backends._loaded["triton"])\n'
    )
    result = run_python('-c', WITHOUT_KERNELS + script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('[ ] Triton kernels') and reason in result.stdout


# --- On a GPU -----------------------------------------------------------------------------------

GPU_CASES = [
    (dtype, causal, shape)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for causal in (False, True)
    for shape in ((2, 1, 5), (2, 7, 33), (1, 196, 192), (3, 257, 31), (1, 4096, 70))
]


@pytest.mark.cuda
@pytest.mark.parametrize(('dtype', 'causal', 'shape'), GPU_CASES)
def test_compiled_kernels_on_a_gpu(dtype, causal, shape):
    """Triton's kernels, whether or not they are what serves this GPU, against the scan."""
    from vrwkv_ops import scan

    generator = torch.Generator('cuda').manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    _, tokens, channels = shape
    options = dict(generator=generator, device='cuda', dtype=torch.float64)
    w = (torch.rand(channels, **options) * 60 - 30) / tokens
    u = torch.randn(channels, **options)
    k = torch.rand(shape, **options) * 20 - 10
    v, gy = torch.randn(2, *shape, **options)
    w, u, k, v, gy = [x.to(wide) for x in (w, u)] + [x.to(dtype) for x in (k, v, gy)]
    saved = bi_wkv.forward(w, u, k, v, causal, True)
    results = [saved[0], *bi_wkv.backward(gy, w, u, k, v, *saved, causal)]
    again = bi_wkv.backward(gy, w, u, k, v, *saved, causal)
    assert all(torch.equal(a, b) for a, b in zip(again, results[1:], strict=True))
    wide_inputs = [x.double() for x in (w, u, k, v)]
    y, z = scan.forward(*wide_inputs, causal)
    truths = [y, *scan.backward(gy.double(), *wide_inputs, y, z, causal)]
    for i, (got, expected) in enumerate(zip(results, truths, strict=True)):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        scale = max(expected.norm(), 0.1 * gy.double().norm())  # zero for T = 1
        bar = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-5 if i in (0, 4) else 3e-5)
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * scale


@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', ['q_shift', 'single_shift', 'double_shift'])
def test_compiled_shifts_on_a_gpu(dtype, mode):
    from vrwkv_ops import shift as slices

    x = torch.randn(2, 15, 70, device='cuda', dtype=dtype)
    mixes = torch.rand(3, 70, device='cuda')
    args = (3, 5, 1, 0.25, mode)
    grads = [torch.randn_like(x) for _ in range(3)]
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for got, expected in zip(
        [*shift.token_shift(x, mixes, *args), *shift.token_shift_backward(grads, x, mixes, *args)],
        [*slices.forward(x, mixes, *args), *slices.backward(grads, x, mixes, *args)],
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps)
    if mode == 'q_shift':
        expected = slices.shift_slices(x, 3, 5, 1, 0.25)
        assert torch.equal(shift.q_shift(x, 3, 5, 1, 0.25, False), expected)
