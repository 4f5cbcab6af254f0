"""What only the Triton backend has: tiles, kernels compiled for an absent GPU, and dispatch."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import vrwkv_ops
from vrwkv_ops import backends, ops
from vrwkv_ops import triton as backend_module
from vrwkv_ops.reference import bi_wkv_reference
from vrwkv_ops.triton import bi_wkv, bi_wkv6, pointwise
from vrwkv_ops.triton import ms_deform_attn as deform
from vrwkv_ops.triton import token_shift as shift

from .backends import BACKENDS, HIDE_KERNELS, interpreter
from .dense_bi_wkv import dense_with_gradients
from .dense_bi_wkv6 import dense_bi_wkv6
from .test_bi_wkv import make_inputs, relative_error, run
from .test_bi_wkv6 import errors as errors6
from .test_bi_wkv6 import make as make6
from .test_bi_wkv6 import run as run6

# --- Tiles, in the interpreter ------------------------------------------------------------------


@pytest.fixture
def interpreted():
    """The interpreted kernels, and a function that sets their tiles."""
    with next(x for x in BACKENDS if x.name == 'triton-interpreted').serving() as backend:
        yield backend
    interpreter().call('use_tiles', 8, 4, 2)


def use_tiles(*tiling):
    interpreter().call('use_tiles', *tiling)


def test_a_token_alone_gets_its_very_value(interpreted):
    """Not v e^k / e^k, which may round: its weights move nothing, and their gradients are 0."""
    w, u, k, v, gy = make_inputs(1, 8)
    y, gw, gu, gk, gv = run(interpreted, w, u, k, v, gy)
    assert torch.equal(y, v)
    assert not gw.any() and not gu.any() and not gk.any()
    torch.testing.assert_close(gv, gy, rtol=1e-6, atol=0)


def test_errors_do_not_grow_with_the_number_of_tokens(interpreted):
    """50 tiles of two tokens: joining them is what could add up roundings of 6e-8.

    Gradients have the error of z, which is rounded to float32 between the passes.
    """
    use_tiles(2, 2, 128)
    generator = torch.Generator().manual_seed(100)
    u = torch.randn(2, generator=generator, dtype=torch.float64)
    k = torch.rand(1, 100, 2, generator=generator, dtype=torch.float64) * 60 - 30
    v, gy = torch.randn(2, 1, 100, 2, generator=generator, dtype=torch.float64)
    inputs = [torch.tensor([30.0, -30.0]) / 100, *(x.float() for x in (u, k, v, gy))]
    truths = dense_with_gradients(*inputs)
    for got, expected, bar in zip(
        run(interpreted, *inputs), truths, (3e-7, *[1e-5] * 4), strict=True
    ):
        assert relative_error(got, expected) <= bar


@pytest.mark.parametrize('tokens', [196, 257])
def test_chosen_tiles_are_right(interpreted, tokens):
    """The tiles of real runs: a short sequence in one, another in several of 64 tokens."""
    use_tiles()
    inputs = make_inputs(tokens, 3, 1, w_total=300)
    truths = dense_with_gradients(*inputs)
    # Decays of ten times 30, where gradients may err so much more, and y not: the power of a
    # decay over all steps of a tile is as good as one rounding.
    for got, expected, bar in zip(
        run(interpreted, *inputs), truths, (3e-7, *[1e-4] * 4), strict=True
    ):
        assert relative_error(got, expected) <= bar


@pytest.mark.parametrize(
    ('sizes', 'mean', 'causal'),
    [((2, 1, 1, 8), 0, False), ((1, 18, 2, 24), -20, False), ((1, 33, 1, 8), 3, True)],
    ids=str,
)
def test_bi_wkv6(interpreted, sizes, mean, causal):
    """More than one chunk, padded heads, strides, extreme decays; five roundings of float32."""
    inputs, gy = make6(*sizes, mean, torch.float32)
    inputs[3][:, -1], inputs[3][:, sizes[1] // 2] = float('inf'), float('-inf')
    finite = [x.double().clamp(-700, 700) for x in inputs]
    truth = run6(dense_bi_wkv6, finite, gy.double(), causal=causal)
    moved = [*(x.mT.contiguous().mT for x in inputs[:4]), inputs[4]]
    results = run6(vrwkv_ops.bi_wkv6, moved, gy, causal=causal)
    assert max(errors6(results, truth)) < 6e-7


@pytest.mark.parametrize('tokens', [1, 3, 64, 196, 256, 257, 4096, 1 << 20])
@pytest.mark.parametrize('elements', [512, 1024, 2048])
def test_chosen_tilings(tokens, elements):
    tiling = bi_wkv.choose_tiling(tokens, elements)
    assert all(size & (size - 1) == 0 for size in tiling)
    assert tiling.tokens * tiling.channels <= elements and tiling.channels >= 2
    assert tokens > 256 or tiling.tokens >= tokens


def test_direct_calls_are_told_what_is_wrong(interpreted):
    operators = torch.ops.vrwkv_ops
    w, k = torch.zeros(4), torch.zeros(2, 6, 4)
    with pytest.raises(RuntimeError, match=r'expected u of shape \(4,\).*got \(3,\)'):
        operators.bi_wkv_forward(w, w[:3], k, k, False, False)
    y, residual, z = operators.bi_wkv_forward(w, w, k, k, False, False)
    with pytest.raises(RuntimeError, match=r'expected z of shape \(2, 6, 4\)'):
        operators.bi_wkv_backward(k, w, w, k, k, y, residual, z, False)  # z was not saved
    with pytest.raises(RuntimeError, match='grid of 3 x 3'):
        operators.q_shift(k, 3, 3, 1, 0.25, False)
    with pytest.raises(RuntimeError, match='expected mixes of shape'):
        operators.token_shift_forward(k, w, 2, 3, 1, 0.25, 'q_shift')
    with pytest.raises(RuntimeError, match='expected 2 gradients'):
        operators.token_shift_backward([k], k, torch.zeros(2, 4), 2, 3, 1, 0.25, 'q_shift')
    with pytest.raises(RuntimeError, match='floats of one shape, dtype and device'):
        operators.sigmoid_gate(k, k[:1])


# --- Compiled ahead of time for an H100 ---------------------------------------------------------

DTYPES = {'fp32': 'fp32', 'fp16': 'fp32', 'bf16': 'fp32', 'fp64': 'fp64'}
IN_ACCUMULATION_DTYPE = {'w', 'u', 'own', 'entering', 'z', 'gw', 'gu', 'mixes', 'gmixes'}
IN_ACCUMULATION_DTYPE |= {'locations', 'weights', 'sums', 'gpoints', 'gweights'}
IN_ACCUMULATION_DTYPE |= {'d', 'gd', 'edges', 'states'}
BOTH = dict(CAUSAL=False, BLOCK_T=64, BLOCK_C=16)
SHORT = dict(CAUSAL=True, BLOCK_T=256, BLOCK_C=4)
JOIN = dict(BLOCK_T=64, BLOCK_N=128, BLOCK_C=4)
# Triton makes constants of integers that are 1.
ONE_TILE = dict(T=1, C=1, tiles=1, CAUSAL=False, BLOCK_T=1, BLOCK_C=64)
ONE_BLOCK = dict(T=1, C=1, blocks=1, height=1, width=1, step=1, head=1, pieces=1, **shift._BLOCKS)
FLAT = dict(ACC=tl.float32, BLOCK=pointwise._BLOCK)
PLACES = dict(ACC=tl.float32, PLACES=32, BLOCK_D=32)
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
    (bi_wkv6.forward_kernel, dict(CAUSAL=False, BLOCK_N=64, BLOCK_V=16)),
    (bi_wkv6.backward_kernel, dict(REVERSE=True, BLOCK_N=64, CHUNK=16)),
    (shift.q_shift_kernel, shift._BLOCKS),
    (shift.token_shift_kernel, dict(N=3, **shift._BLOCKS)),
    (shift.token_shift_backward_kernel, dict(N=2, **shift._BLOCKS)),
    (shift.token_shift_backward_kernel, dict(N=3, **ONE_BLOCK)),
    (deform.forward_kernel, PLACES),
    (deform.backward_kernel, dict(IN_ORDER=False, **PLACES)),
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
        elif name == 'shapes_ptr':
            signature[name] = '*i64'
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
    """Shows errors of types and of the compiler, which the interpreter does not see."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # compile indeed
    joins = kernel is bi_wkv.join_tiles  # in float64 for all
    once = joins or 'ACC' in constants or constants.get('CAUSAL') or 'T' in constants
    for dtype in ('bf16',) if once else ('bf16', 'fp64'):
        ptx = compile_for_h100(kernel, dtype, constants)
        assert '.target sm_90' in ptx
        if kernel is not deform.backward_kernel:
            assert 'atom' not in ptx  # results do not depend on who comes first
        # Rounds to nearest: the interpreter does not.
        assert 'cvt.rz.bf16' not in ptx


# --- Dispatch -----------------------------------------------------------------------------------

WITHOUT_KERNELS = (
    HIDE_KERNELS
    + """
import sys
import torch
from vrwkv_ops import backends, definitions, ops, triton
assert backends.triton_serves_gpus()
assert 'triton.language' not in sys.modules  # not before it is needed
names = torch._C._dispatch_get_all_op_names()
names = {n.split('::')[1] for n in names if n.startswith('vrwkv_ops::')}
names -= {op.name for op in definitions.OPERATORS if op.is_composite}
assert names == set(ops.SCAN_KERNELS) <= set(triton._operators()), names
for name in names:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f'vrwkv_ops::{name}', 'CUDA'), name
    assert not has(f'vrwkv_ops::{name}', 'CPU'), name
"""
)


def test_triton_serves_gpus_without_compiled_kernels():
    """Every operator, and CPUs none."""
    result = subprocess.run(
        [sys.executable, '-c', WITHOUT_KERNELS],
        env={**os.environ, 'TRITON_INTERPRET': '0'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ('is_missing', 'reason'),
    # On CPU tensors without the interpreter, Triton finds no driver: any error will do.
    [(False, 'they do not work here'), (True, 'ModuleNotFoundError')],
)
def test_the_scan_stands_in_where_triton_fails(monkeypatch, is_missing, reason):
    """Shown on the CPU, where Triton cannot run: one warning, and right results."""
    cpu = backends._loaded['cpu']
    monkeypatch.setattr(backends, '_loaded', {**backends._loaded, 'cuda': cpu})
    monkeypatch.setattr(backends, '_warned', set())
    caches = (backend_module.works_on, backend_module._operators)
    if is_missing:
        monkeypatch.setitem(sys.modules, 'triton', None)
        for name in ('bi_wkv', 'bi_wkv6', 'bi_wkv_state', 'common', 'pointwise', 'token_shift'):
            monkeypatch.delitem(sys.modules, f'vrwkv_ops.triton.{name}')
            monkeypatch.delattr(backend_module, name)
    for cache in caches:
        cache.cache_clear()
    w, u = torch.randn(2, 8)
    k, v = torch.randn(2, 2, 6, 8, requires_grad=True)
    backend_module.serve('CPU', ops.SCAN_KERNELS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            y = vrwkv_ops.bi_wkv(w, u, vrwkv_ops.q_shift(k, (2, 3)), v)
            y.sum().backward()
    finally:
        backend_module._FOR_GOOD.pop()._destroy()
        for cache in caches:
            cache.cache_clear()
    assert len([c for c in caught if 'pure-PyTorch' in str(c.message)]) == 1
    torch.testing.assert_close(y, bi_wkv_reference(w, u, vrwkv_ops.q_shift(k, (2, 3)), v))
    assert str(backends._loaded['triton']).startswith('[ ] Triton kernels')
    assert reason in str(backends._loaded['triton'])
