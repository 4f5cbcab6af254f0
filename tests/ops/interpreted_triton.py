"""The Triton kernels on the CPU, in Triton's interpreter; test_triton.py runs this file.

By hand: ``TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_triton.py``. The interpreter
takes some 10 ms a program whatever its tile holds: tiles are small here, and few to a case.
"""

import functools
import itertools
import math
import os

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.library import opcheck
from triton.runtime import interpreter

from vrwkv_ops import bi_wkv, ops, q_shift, token_shift
from vrwkv_ops import triton as backend
from vrwkv_ops.checks import SHIFT_MODES
from vrwkv_ops.reference import q_shift_reference, token_shift_reference

from . import test_wrong_calls
from .dense_bi_wkv import dense_with_gradients

if os.environ.get('TRITON_INTERPRET') != '1':
    raise RuntimeError('Set TRITON_INTERPRET=1 for these tests, before Python starts')

from vrwkv_ops.triton import bi_wkv as kernels
from vrwkv_ops.triton import pointwise
from vrwkv_ops.triton import token_shift as shift_kernels

# From here on, the public functions run Triton's kernels on CPU tensors.
backend.serve('CPU', ops.SCAN_KERNELS)

both_directions = pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
NAMES = ['y', 'gw', 'gu', 'gk', 'gv']
CHOOSE_TILING = kernels.choose_tiling
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 8 tokens and 4 channels, of which 2 are joined at a time."""
    use_tiles(monkeypatch, 8, 4, 2)
    monkeypatch.setattr(shift_kernels, '_BLOCKS', dict(BLOCK_T=8, BLOCK_C=8))


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    """Rounds to the nearest bfloat16, see test_triton.py, and lets min and max pass over NaN.

    The interpreter cuts off the bits that do not fit, and its min and max of NaN are NaN.
    """
    cut = interpreter._convert_float

    def convert(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, '_convert_float', convert)
    for name, function in (('create_minnumf', np.fmin), ('create_maxnumf', np.fmax)):
        operation = functools.partialmethod(interpreter.InterpreterBuilder.binary_op, op=function)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, operation)


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Leaves out what takes the interpreter most of its time.

    It patches Triton's language at each call of a helper, though it has at the launch, and scans
    element by element. GPUs scan in a tree, which shows whether joining is associative; handing it
    the later element first shows whether it is commutative.
    """

    def scan(self, inputs):
        parts = [x.handle.data for x in inputs]
        row = np.arange(len(parts[0]))[:, None]
        for step in (1 << i for i in range((len(row) - 1).bit_length())):
            earlier, later = (
                [self.to_tensor(part, x.dtype) for part, x in zip(side, inputs, strict=True)]
                for side in ([np.roll(part, step, axis=0) for part in parts], parts)
            )
            joined = self.combine_fn.fn(*later, *earlier)
            parts = [
                np.where(row < step, part, x.handle.data)
                for part, x in zip(parts, joined, strict=True)
            ]
        return [self.to_tensor(part, x.dtype) for part, x in zip(parts, inputs, strict=True)]

    for function in (kernels.locate, tl.sum):  # whose globals are Triton's language, and its core
        interpreter._patch_lang(function.fn)
    monkeypatch.setattr(interpreter.ScanOps, 'generic_scan', scan)
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        '__call__',
        lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs),
    )


def use_tiles(monkeypatch, *tiling):
    monkeypatch.setattr(kernels, 'choose_tiling', lambda *_: kernels.Tiling(*tiling))


def make_inputs(tokens, channels=3, batch=2, *, k_max=3.0, w_total=3.0, dtype=torch.float32):
    """Random w, u, k, v and output gradient, with decays of both signs."""
    generator = torch.Generator().manual_seed(tokens)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.linspace(-1, 1, channels, dtype=torch.float64) * w_total / tokens
    u = torch.randn(channels, generator=generator, dtype=torch.float64)
    k = torch.rand(batch, tokens, channels, generator=generator, dtype=torch.float64) * 2 - 1
    v, gy = torch.randn(2, batch, tokens, channels, generator=generator, dtype=torch.float64)
    return [x.to(parameter_dtype) for x in (w, u)] + [x.to(dtype) for x in (k * k_max, v, gy)]


def run(w, u, k, v, gy, causal=False):
    """Output and the gradients of w, u, k and v."""
    inputs = [x.detach().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*inputs, causal)
    gradients = torch.autograd.grad(y, inputs, gy, materialize_grads=True)
    return [y.detach(), *gradients]


def relative_error(got, expected):
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item() if difference else 0.0


def test_triton_is_what_runs(monkeypatch):
    """Or else all that follows would test other kernels."""
    calls = []
    forward = backend._operators()['bi_wkv_forward']
    monkeypatch.setitem(
        backend._operators(), 'bi_wkv_forward', lambda *args: calls.append(args) or forward(*args)
    )
    bi_wkv(*make_inputs(2)[:4])
    assert len(calls) == 1


def test_values_worked_out_by_hand():
    """As in test_bi_wkv.py: w = ln 2 halves a weight per step, u = ln 3 triples the token's own."""
    w, u, log2 = torch.tensor([math.log(2)]), torch.tensor([math.log(3)]), math.log(2)
    k = torch.tensor([0.0, log2, 0.0]).reshape(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1)
    weights = torch.tensor([[3, 2, 1 / 2], [1, 6, 1], [1 / 2, 2, 3]])
    for causal, part in ((False, weights), (True, weights.tril())):
        expected = (part @ v[0]) / part.sum(1, keepdim=True)
        torch.testing.assert_close(bi_wkv(w, u, k, v, causal)[0], expected, rtol=1e-6, atol=0)


def test_a_token_alone_gets_its_very_value():
    """Not v e^k / e^k, which may round: its weights move nothing, and their gradients are 0."""
    w, u, k, v, gy = make_inputs(1, 8)
    y, gw, gu, gk, gv = run(w, u, k, v, gy)
    assert torch.equal(y, v)
    assert not gw.any() and not gu.any() and not gk.any()
    torch.testing.assert_close(gv, gy, rtol=1e-6, atol=0)


@both_directions
@pytest.mark.parametrize('shape', [(2, 1, 3), (2, 7, 3), (1, 8, 4), (2, 9, 5), (1, 33, 3)])
def test_float64_equals_dense(causal, shape):
    """One tile and several, in T and C, full and not, joined in one to three rounds."""
    batch, tokens, channels = shape
    inputs = make_inputs(tokens, channels, batch, k_max=10, w_total=20, dtype=torch.float64)
    truths = dense_with_gradients(*inputs, causal)
    for got, expected in zip(run(*inputs, causal), truths, strict=True):
        # As in test_bi_wkv.py.
        assert (got - expected).norm() <= 1e-12 * max(expected.norm().item(), tokens)


@both_directions
@pytest.mark.parametrize(('k_max', 'w_total'), [(30, 30), (30, -30)])
def test_float32_accuracy(causal, k_max, w_total):
    """The bar of the project: 1e-5 while |k| <= 30 and |w| T <= 30, gradients included."""
    w, *rest = make_inputs(24, 4, 1, k_max=k_max)
    inputs = [torch.full_like(w, w_total / 24), *rest]
    truths = dense_with_gradients(*inputs, causal)
    for name, got, expected in zip(NAMES, run(*inputs, causal), truths, strict=True):
        assert relative_error(got, expected) <= 1e-5, name


def test_errors_do_not_grow_with_the_number_of_tokens(monkeypatch):
    """50 tiles of two tokens: joining them is what could add up roundings of 6e-8.

    Gradients have the error of z, which is rounded to float32 between the passes.
    """
    use_tiles(monkeypatch, 2, 2, 128)
    _, *rest = make_inputs(100, 2, 1, k_max=30)
    inputs = [torch.tensor([30.0, -30.0]) / 100, *rest]
    truths = dense_with_gradients(*inputs)
    for got, expected, bar in zip(run(*inputs), truths, (3e-7, *[1e-5] * 4), strict=True):
        assert relative_error(got, expected) <= bar


@both_directions
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_types_round_once(causal, dtype):
    """The bars of test_bi_wkv.py."""
    inputs = make_inputs(10, 3, 1, k_max=8, w_total=8, dtype=dtype)
    results, truths = run(*inputs, causal), dense_with_gradients(*inputs, causal)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        assert got.dtype == (torch.float32 if name in ('gw', 'gu') else dtype)
        rounding = 1.001 * (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if name in ('y', 'gv') else 3e-5
        scale = max(expected.norm(), 0.1 * inputs[4].double().norm())
        assert (got.double() - expected).norm() <= rounding + bar * scale, name


@both_directions
@pytest.mark.parametrize('k_max', [1, 1e4])
@pytest.mark.parametrize('w_step', [1e-3, 1e3, -1e3])
def test_extremes_stay_finite_and_accurate(causal, k_max, w_step):
    """As in test_bi_wkv.py: beyond 30 the error may grow in proportion, and never to NaN or Inf."""
    tokens = 19
    w, u, k, v, gy = make_inputs(tokens, 2, 1, k_max=k_max)
    inputs = [torch.full_like(w, w_step), u, k, v, gy]
    results, truths = run(*inputs, causal), dense_with_gradients(*inputs, causal)
    growth = max(1.0, k_max / 30, abs(w_step) * tokens / 30)
    terms = (gy.double().norm() * v.double().norm()).item() / math.sqrt(v.numel())
    scales = (0.0, terms * tokens, terms, terms, 0.0)
    for got, expected, scale in zip(results, truths, scales, strict=True):
        assert torch.isfinite(got).all()
        error = (got.double() - expected).norm().item()
        assert error <= min(1.0, 1e-5 * growth) * max(expected.norm().item(), scale)


@pytest.mark.parametrize('w_step', [math.inf, -math.inf], ids=['decay', 'growth'])
def test_finite_far_beyond_the_limits(w_step):
    w, u, k, *rest = make_inputs(21, 2, 1, k_max=1e6)
    k[0, 5], k[0, 10] = math.inf, -math.inf
    assert all(torch.isfinite(x).all() for x in run(torch.full_like(w, w_step), u, k, *rest))


def test_values_near_the_largest_float():
    w, u, k, v, _ = make_inputs(30, 2, 1)
    v = torch.full_like(v, torch.finfo(v.dtype).max / 2)
    torch.testing.assert_close(bi_wkv(w, u, k, v), v, rtol=1e-5, atol=0)


def test_nan_stays_where_its_weight_reaches():
    w, u, k, v, _ = make_inputs(20)
    clean = bi_wkv(w, u, k, v, causal=True)
    k[0, 10, 1] = math.nan
    y = bi_wkv(w, u, k, v, causal=True)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 10:, 1] = True
    assert y[reached].isnan().all()
    assert torch.equal(y[~reached], clean[~reached])


@pytest.mark.parametrize('parameter', ['w', 'u'])
def test_nan_in_a_parameter_shows_in_its_channel(parameter):
    inputs = make_inputs(9, batch=1)
    clean = run(*inputs)
    inputs['wu'.index(parameter)][1] = math.nan
    for got, expected in zip(run(*inputs), clean, strict=True):
        assert got[..., 1].isnan().all()
        assert torch.equal(got[..., ::2], expected[..., ::2])


def test_strides_do_not_matter():
    w, u, k, v, gy = make_inputs(9, 3, dtype=torch.bfloat16)
    expected = run(w, u, k, v, gy)
    strided = [torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] for x in (k, v, gy)]
    strided[1] = v.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not any(x.is_contiguous() for x in strided)
    assert all(torch.equal(a, b) for a, b in zip(run(w, u, *strided), expected, strict=True))
    y = bi_wkv(w, u, k[:1].expand(2, -1, -1), v[:, :1].expand(-1, 9, -1))
    torch.testing.assert_close(y, bi_wkv(w, u, k[:1].repeat(2, 1, 1), v[:, :1].repeat(1, 9, 1)))


def test_every_output_element_is_written():
    """With fresh memory full of NaN, results stay the same, bit for bit."""
    inputs = make_inputs(10, 3, 1, dtype=torch.bfloat16)
    x, mixes = torch.randn(1, 6, 9), torch.rand(2, 9)
    expected = [*run(*inputs), q_shift(x, (2, 3)), *shift_gradients(token_shift, x, mixes, (2, 3))]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = [*run(*inputs), q_shift(x, (2, 3)), *shift_gradients(token_shift, x, mixes, (2, 3))]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_batch():
    y, gw, gu, gk, gv = run(*make_inputs(5, 3, 0))
    assert y.shape == gk.shape == gv.shape == (0, 5, 3)
    assert not gw.any() and not gu.any()
    x, mixes = torch.empty(0, 6, 8, requires_grad=True), torch.rand(2, 8, requires_grad=True)
    outs = token_shift(x, mixes, (2, 3))
    gx, gmixes = torch.autograd.grad([out.sum() for out in outs], (x, mixes))
    assert q_shift(x, (2, 3)).shape == outs[1].shape == gx.shape == x.shape and not gmixes.any()


@pytest.mark.parametrize('tokens', [1, 3, 64, 196, 256, 257, 4096, 1 << 20])
@pytest.mark.parametrize('elements', [512, 1024, 2048])
def test_chosen_tilings(tokens, elements):
    tiling = CHOOSE_TILING(tokens, elements)
    assert all(size & (size - 1) == 0 for size in tiling)
    assert tiling.tokens * tiling.channels <= elements and tiling.channels >= 2
    assert tokens > 256 or tiling.tokens >= tokens


# --- Token shifts -----------------------------------------------------------------------------

# The dtype decides how elements are read, the others where from: each value of the one meets each
# mode, and each mode each number of mixes and step.
SHIFTS = [(1, 1 / 4), (2, 1 / 5), (9, 1 / 4), (0, 1 / 4)]
MIXES_AND_STEPS = [(1, 1), (2, 2), (3, 1), (3, 20)]
TOKEN_SHIFTS = [
    (dtype, mode, *MIXES_AND_STEPS[i % 4])
    for i, (dtype, mode) in enumerate(itertools.product(DTYPES, SHIFT_MODES))
]


def shift_gradients(function, x, mixes, *args, **kwargs):
    """Results of a token shift, and gradients of x and the mixes under fixed output gradients.

    These are integers, which all dtypes hold.
    """
    x, mixes = (tensor.detach().requires_grad_() for tensor in (x, mixes))
    outs = function(x, mixes, *args, **kwargs)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randint(-9, 9, out.shape, generator=generator).to(out.dtype) for out in outs]
    grads[-1] = grads[-1].transpose(0, 1).contiguous().transpose(0, 1)  # of strides of its own
    return [*outs, *torch.autograd.grad(outs, (x, mixes), grads)]


@pytest.mark.parametrize(
    ('dtype', 'step', 'gamma'),
    [(dtype, *case) for dtype, case in zip(DTYPES, SHIFTS, strict=True)],
)
def test_q_shift(dtype, step, gamma):
    x = torch.randn(2, 15, 10, dtype=torch.float64).to(dtype)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expected = q_shift_reference(strided, (3, 5), step, gamma)
    assert torch.equal(q_shift(strided, (3, 5), step, gamma), expected)
    y = torch.randint(-9, 9, (2, 15, 10)).to(dtype)
    x = torch.randint(-9, 9, (2, 15, 10)).to(dtype).requires_grad_()
    (adjoint,) = torch.autograd.grad(q_shift(x, (3, 5), step, gamma), x, y)
    (expected,) = torch.autograd.grad(q_shift_reference(x, (3, 5), step, gamma), x, y)
    assert torch.equal(adjoint, expected)  # integers: exact


@pytest.mark.parametrize(('dtype', 'mode', 'count', 'step'), TOKEN_SHIFTS)
def test_token_shift(dtype, mode, count, step):
    x = torch.randn(2, 15, 10, dtype=torch.float64).to(dtype)
    mixes = torch.rand(count, 10, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    args = (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), mixes, (3, 5), step)
    results = shift_gradients(token_shift, *args, mode=mode)
    truths = shift_gradients(
        token_shift_reference, x.double(), mixes.double(), (3, 5), step, mode=mode
    )
    # Some roundings of the accumulation dtype at values of up to 300, and one of x's dtype.
    few = 1e-13 if dtype == torch.float64 else 5e-5
    tolerance = dict(rtol=max(few, torch.finfo(dtype).eps), atol=few)
    for got, expected in zip(results[:-1], truths[:-1], strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, **tolerance)
    torch.testing.assert_close(results[-1].double(), truths[-1], rtol=few, atol=few)


# --- Element-wise -------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
def test_squared_relu_and_sigmoid_gate(dtype, monkeypatch):
    """Values and gradients against PyTorch's in float64; several programs, far logits, strides."""
    monkeypatch.setattr(pointwise, '_BLOCK', 8)
    r, x, grad = (torch.randn(3, 7, dtype=torch.float64).to(dtype).t() for _ in range(3))
    r[0, 0], r[0, 1], x[0, 0] = -60, 60, 0
    leaves = [t.double().detach().requires_grad_() for t in (r, x)]
    gated, squared = torch.sigmoid(leaves[0]) * leaves[1], torch.relu(leaves[1]) ** 2
    truths = [
        *(gated, *torch.autograd.grad(gated, leaves, grad.double())),
        *(squared, *torch.autograd.grad(squared, leaves[1:], grad.double())),
    ]
    results = [
        *(pointwise.sigmoid_gate(r, x), *pointwise.sigmoid_gate_backward(grad, r, x)),
        *(pointwise.squared_relu(x), pointwise.squared_relu_backward(grad, x)),
    ]
    eps = max(torch.finfo(dtype).eps, 2e-6 if dtype != torch.float64 else 1e-14)
    for got, expected in zip(results, truths, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), expected.detach(), rtol=eps, atol=1e-7)
    assert pointwise.squared_relu(x[:0]).shape == (0, 3)
    with pytest.raises(RuntimeError, match='one shape, dtype and device'):
        pointwise.sigmoid_gate(r, x[:1])


# --- What the dispatcher promises ---------------------------------------------------------------


def test_opcheck():
    w, u, k, v, gy = make_inputs(6, 4, 1, dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (w, u, k, v)]
    detached = [x.detach() for x in inputs]
    opcheck(torch.ops.vrwkv_ops.bi_wkv_forward.default, (*inputs, False, True))
    saved = torch.ops.vrwkv_ops.bi_wkv_forward(*detached, False, True)
    opcheck(torch.ops.vrwkv_ops.bi_wkv_backward.default, (gy, *detached, *saved, False))
    opcheck(torch.ops.vrwkv_ops.q_shift.default, (inputs[2], 2, 3, 1, 0.25, True))
    mixes = torch.rand(2, 4, requires_grad=True)
    opcheck(torch.ops.vrwkv_ops.token_shift.default, (inputs[2], mixes, 2, 3, 1, 0.25, 'q_shift'))


# The same table of wrong calls, and direct calls that would reach foreign memory: now by Triton.
globals().update(
    {name: test for name, test in vars(test_wrong_calls).items() if name.startswith('test_')}
)


def test_direct_calls_are_told_what_is_wrong():
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
        operators.token_shift(k, w, 2, 3, 1, 0.25, 'q_shift')
    with pytest.raises(RuntimeError, match='expected 2 gradients'):
        operators.token_shift_backward([k], k, torch.zeros(2, 4), 2, 3, 1, 0.25, 'q_shift')


def test_chosen_tiles_are_right(monkeypatch):
    """The tiles of real runs: a short sequence in one, another in several of 64 tokens."""
    monkeypatch.setattr(kernels, 'choose_tiling', CHOOSE_TILING)
    for tokens in (196, 257):
        inputs = make_inputs(tokens, 3, 1, w_total=300)
        truths = dense_with_gradients(*inputs)
        # Decays of ten times 30, where gradients may err so much more, and y not: the power of a
        # decay over all steps of a tile is as good as one rounding.
        for got, expected, bar in zip(run(*inputs), truths, (3e-7, *[1e-4] * 4), strict=True):
            assert relative_error(got, expected) <= bar
