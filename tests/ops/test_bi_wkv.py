"""What only Bi-WKV has: hand-computed cases, and accuracy over keys, decays and lengths."""

import itertools
import math

import pytest
import torch

from vrwkv_ops.reference import bi_wkv_reference

from .backends import has_kernels, is_quick, on
from .dense_bi_wkv import dense_bi_wkv, dense_with_gradients
from .operators import HALF

both_directions = pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
NAMES = ('y', 'gw', 'gu', 'gk', 'gv')


def make_inputs(
    tokens, channels=6, batch=2, *, k_max=3.0, w_total=3.0, dtype=torch.float32, seed=0
):
    """Random w, u, k, v and output gradient; |w| T and |k| reach the limits given."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape, limit=1.0):
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * limit

    w = uniform(channels, limit=abs(w_total) / tokens)
    w[0] = w_total / tokens
    w[-1] = -w_total / tokens
    u = uniform(channels)
    k = uniform(batch, tokens, channels, limit=k_max)
    v, gy = (
        torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(parameter_dtype) for x in (w, u)] + [x.to(dtype) for x in (k, v, gy)]


def run(backend, w, u, k, v, gy, causal=False):
    """Output and the gradients of w, u, k and v, on the CPU."""
    inputs = [x.detach().to(backend.device).requires_grad_() for x in (w, u, k, v)]
    y = backend.function('bi_wkv')(*inputs, causal)
    gradients = torch.autograd.grad(y, inputs, gy.to(backend.device), materialize_grads=True)
    return [x.detach().cpu() for x in (y, *gradients)]


def run_rows(backend, inputs, causal, rows):
    """Results where only some tokens' outputs have a gradient, and the truth of them."""
    *tensors, gy = inputs
    chosen = torch.zeros_like(gy)
    chosen[:, rows] = gy[:, rows]
    y, *gradients = run(backend, *tensors, chosen, causal)
    return [y[:, rows], *gradients], dense_with_gradients(*tensors, gy[:, rows], causal, rows)


def relative_error(got, expected):
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item() if difference else 0.0


# --- Values -----------------------------------------------------------------------------------


@on()
def test_values_worked_out_by_hand(backend):
    """w = ln 2 halves a weight per step, u = ln 3 triples the token's own."""
    w, u, log2 = torch.tensor([math.log(2)]), torch.tensor([math.log(3)]), math.log(2)
    k = torch.tensor([0.0, log2, 0.0]).reshape(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1)
    # Weights of the three tokens, for each output token; e^k is 1, 2, 1.
    weights = torch.tensor([[3, 2, 1 / 2], [1, 6, 1], [1 / 2, 2, 3]])
    inputs = [x.to(backend.device) for x in (w, u, k, v)]
    for causal, part in ((False, weights), (True, weights.tril())):
        expected = (part @ v[0]) / part.sum(1, keepdim=True)
        y = backend.function('bi_wkv')(*inputs, causal=causal).cpu()
        torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=0)


@on()
def test_one_token_attends_to_itself(backend):
    w, u, k, v, gy = make_inputs(1)
    y, gw, gu, gk, gv = run(backend, w, u, k, v, gy)
    torch.testing.assert_close(y, v, rtol=1e-6, atol=0)
    torch.testing.assert_close(gv, gy, rtol=1e-6, atol=0)
    # Rounding of y only: nothing else could move the output.
    for gradient in (gw, gu, gk):
        assert gradient.abs().max() < 1e-6


@on('tokens', [1, 2, 3, 4, 5, 7, 16, 63, 64, 65, 127, 200, 1000])
@both_directions
def test_float64_equals_dense(backend, tokens, causal):
    inputs = make_inputs(tokens, k_max=10, w_total=20, dtype=torch.float64)
    for got, expected in zip(
        run(backend, *inputs, causal), dense_with_gradients(*inputs, causal), strict=True
    ):
        # 1e-12: some hundred roundings of 1e-16 times exponents up to 30. The absolute part is for
        # gradients that are 0 in exact arithmetic.
        scale = max(expected.norm().item(), tokens)
        assert (got - expected).norm().item() <= 1e-12 * scale


def sampled_rows(tokens, ends=True):
    """All tokens, or a few of many: for these the dense formula is exact at a cost of T each."""
    if tokens <= 1000:
        return torch.arange(tokens)
    inner = torch.randint(2, tokens - 2, (6,), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.tensor([0, 1, tokens - 2, tokens - 1] if ends else []), inner]).long()


ACCURATE = [
    *((24, 30, w) for w in (30, -30)),
    *itertools.product((64, 300), (1, 30), (0, 5, 30, -30)),
    *((65536, 30, 30), (65536, 1, -30)),
]


@on('tokens k_max w_total', ACCURATE, only=has_kernels)
@both_directions
def test_float32_accuracy(backend, tokens, k_max, w_total, causal):
    """The bar of the project: 1e-5 relative while |k| <= 30 and |w| T <= 30, gradients included."""
    shape = (4, 1) if tokens <= 24 else (16, 2) if tokens <= 1000 else (2, 1)
    inputs = make_inputs(tokens, *shape, k_max=k_max, w_total=w_total, seed=tokens)
    # Not the first tokens of a long causal run: their outputs nearly equal v, so that their share
    # in gu, v - y, is all rounding, and of a few sampled tokens it would be the largest.
    results, truths = run_rows(backend, inputs, causal, sampled_rows(tokens, ends=False))
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        assert relative_error(got, expected) <= 1e-5, name


@on('tokens', [1, 7, 10, 65, 1000, 65536], only=has_kernels)
@both_directions
@pytest.mark.parametrize('dtype', HALF, ids=['float16', 'bfloat16'])
def test_half_types_round_once(backend, tokens, causal, dtype):
    """Half types: the float64 result of the same inputs, rounded once, plus the float32 bar.

    At T = 65,536 sums in half precision would be lost.
    """
    shape = (3, 1) if tokens == 10 else (6, 2) if tokens <= 1000 else (2, 1)
    inputs = make_inputs(tokens, *shape, k_max=8, w_total=8, dtype=dtype)
    rows = sampled_rows(tokens, ends=not causal)
    results, truths = run_rows(backend, inputs, causal, rows)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        assert got.dtype == (torch.float32 if name in ('gw', 'gu') else dtype)
        rounding = (expected.to(got.dtype).double() - expected).norm()
        # y is kept in two halves for the gradients: 16 bits of bfloat16, so that 2e-5 joins 1e-5.
        bar = 1e-5 if name in ('y', 'gv') else 3e-5
        # For T = 1 the truth is 0, and an error may be as large as a rounding of v.
        scale = expected.norm()
        if tokens <= 1000:
            scale = max(scale, 0.1 * inputs[4].double().norm())
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * scale, name


EXTREME = [
    *itertools.product((1, 2, 3, 17, 300), (1, 1e4), [(1e-3, 1e3, -1e-3, -1e3)]),
    *((65536, 1, (-1e3,)), (65536, 1e4, (1e3, -1e-3))),
]


@on('tokens k_max steps', EXTREME, only=has_kernels)
@both_directions
def test_extremes_stay_finite(backend, tokens, k_max, steps, causal):
    """y stays exact. Errors of gradients may grow with |k| and |w| T, as z is rounded to float32.

    At T = 65,536 and |w| = 1e3 they reach 100 %: there only NaN and infinity fail.
    """
    for w_step in steps:
        w, u, k, v, gy = make_inputs(tokens, 2, 1, k_max=k_max, seed=tokens)
        check_extreme(backend, torch.full_like(w, w_step), u, k, v, gy, causal)


def check_extreme(backend, w, u, k, v, gy, causal):
    tokens, k_max, w_step = k.shape[1], k.abs().max().item(), w[0].item()
    rows = sampled_rows(tokens)
    inputs = w, u, k, v, gy
    results, truths = run_rows(backend, inputs, causal, rows)
    assert all(torch.isfinite(x).all() for x in results)
    growth = max(1.0, k_max / 30, abs(w_step) * tokens / 30)
    # A gradient that vanishes (one token takes all the weight) is right to a rounding of its terms,
    # gy v, which gw has times a distance.
    terms = (gy[:, rows].double().norm() * v.double().norm()).item() / math.sqrt(v.numel())
    scales = (0.0, terms * tokens, terms, terms, 0.0)
    for name, got, expected, scale in zip(NAMES, results, truths, scales, strict=True):
        error = (got.double() - expected).norm().item()
        # The rounded log of the denominator moves the gradients; the output stays within the bar.
        allowed = 1e-5 if name == 'y' else min(1.0, 1e-5 * growth)
        bar = allowed * max(expected.norm().item(), scale)
        assert error <= bar, (name, w_step)


@on('tokens', [150, 400], only=has_kernels)
@both_directions
@pytest.mark.parametrize('w_step', [0.5, 0.02, -0.02, -0.3])
@pytest.mark.parametrize(('first', 'last'), [(130, 140), (60, 300), (0, 128)])
def test_fast_and_careful_paths_meet(backend, tokens, first, last, w_step, causal):
    """Keys far above or below the others: kernels change their path within a sequence."""
    for jump in (-60, 60):
        w, u, k, v, gy = make_inputs(tokens, 3, 1, k_max=10)
        k[:, first:last, 1] += jump
        k[:, first : first + 3, 2] += jump
        check_extreme(backend, torch.full_like(w, w_step), u, k, v, gy, causal)


@on('tokens', [21, 1000, 3000], only=has_kernels)
@both_directions
@pytest.mark.parametrize('w_step', [1e6, math.inf])
def test_finite_far_beyond_the_limits(backend, tokens, w_step, causal):
    """Here exponents are wrong by hundreds, e^100 overflows, and weights must stay below 1."""
    if math.isinf(w_step) and 'pytorch' in backend.name:
        w_step = 1e30  # the scan needs numbers
    for sign in (1, -1):
        w, u, k, v, gy = make_inputs(tokens, 2, 1, k_max=1e6)
        if math.isinf(w_step) and 'triton' in backend.name:
            k[0, 5], k[0, 10] = math.inf, -math.inf
        results = run(backend, torch.full_like(w, sign * w_step), u, k, v, gy, causal)
        assert all(torch.isfinite(x).all() for x in results)


@on('tokens', [30, 300], only=has_kernels)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_values_near_the_largest_float(backend, tokens, dtype):
    """A mean of large values is no larger, though their sum would overflow."""
    w, u, k, v, _ = make_inputs(tokens, 2, 1, dtype=dtype)
    v = torch.full_like(v, torch.finfo(dtype).max / 2)
    for decay in (w, torch.full_like(w, -0.15)):  # weights that grow with distance, too
        y = backend.function('bi_wkv')(*(x.to(backend.device) for x in (decay, u, k, v)))
        torch.testing.assert_close(y.cpu(), v, rtol=1e-5 if dtype == torch.float32 else 0, atol=0)


@on('hidden', [slice(1), slice(7, 9), slice(-1, None)])
@both_directions
def test_a_key_of_minus_infinity_hides_its_token(backend, hidden, causal):
    """Also the first token, before which there is nothing else."""
    inputs = make_inputs(20)
    inputs[2][:, hidden] = -math.inf
    rows = torch.arange(1, 20)  # a causal first token sees nothing but itself
    for got, expected in zip(*run_rows(backend, inputs, causal, rows), strict=True):
        assert relative_error(got, expected) < 1e-6


@on(only=has_kernels)
@both_directions
@pytest.mark.parametrize('name', ['w', 'u', 'k', 'v'])
def test_nan_shows_in_all_gradients_that_it_enters(backend, name, causal):
    """All of its channel take part in the output of the last token, which has seen it."""
    inputs = make_inputs(20, 3, 1)
    clean = run(backend, *inputs, causal)
    inputs['wukv'.index(name)][(0, 10, 1) if name in 'kv' else 1] = math.nan
    results = run(backend, *inputs, causal)
    for which, got, expected in zip(NAMES, results, clean, strict=True):
        others, clean_others = got[..., [0, 2]], expected[..., [0, 2]]
        if backend.name == 'cpu' or 'cuda' in backend.name:  # the careful path
            torch.testing.assert_close(others, clean_others, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(others, clean_others)
        if which == 'gv' and name == 'v':  # v does not enter
            assert got.isfinite().all()
        elif which == 'y' and causal and name in 'kv':
            assert got[:, 10:, 1].isnan().all()
        elif not (causal and name in 'wu'):
            assert got[..., 1].isnan().all(), which


@on()
def test_nan_stays_where_its_weight_reaches(backend):
    """A NaN in one channel, or in the future of a causal run, leaves the others alone."""
    w, u, k, v, _ = (x.to(backend.device) for x in make_inputs(40 if is_quick(backend) else 20))
    clean = backend.function('bi_wkv')(w, u, k, v, causal=True)
    k[0, 15, 1] = math.nan
    y = backend.function('bi_wkv')(w, u, k, v, causal=True)
    assert y[0, 15:, 1].isnan().all()
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 15:, 1] = True
    assert torch.equal(y[~reached], clean[~reached])


# --- PyTorch alone ----------------------------------------------------------------------------


def test_loops_and_dense_agree_on_far_tokens():
    """The two statements of the formula, in float64 and at exponents in the thousands."""
    w, u, k, v, _ = make_inputs(50, k_max=1e4, w_total=5e3, dtype=torch.float64)
    for causal in (False, True):
        torch.testing.assert_close(
            bi_wkv_reference(w, u, k, v, causal),
            dense_bi_wkv(w, u, k, v, causal),
            rtol=1e-9,
            atol=1e-11,
        )
