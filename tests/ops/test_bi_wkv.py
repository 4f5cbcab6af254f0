"""Bi-WKV: every backend against hand-computed cases and a dense float64 softmax."""

import math

import pytest
import torch

from vrwkv_ops import bi_wkv
from vrwkv_ops.reference import bi_wkv_reference
from vrwkv_ops.scan import bi_wkv_scan

from .dense_bi_wkv import dense_bi_wkv, dense_with_gradients

LOOPS = pytest.param((bi_wkv_reference, 'cpu'), id='reference')
SCAN = pytest.param((bi_wkv_scan, 'cpu'), id='scan')
KERNEL = pytest.param((bi_wkv, 'cpu'), id='kernel-cpu')
ON_GPU = [
    pytest.param((bi_wkv_scan, 'cuda'), id='scan-cuda', marks=pytest.mark.cuda),
    pytest.param((bi_wkv, 'cuda'), id='kernel-cuda', marks=pytest.mark.cuda),
]
all_backends = pytest.mark.parametrize('backend', [LOOPS, SCAN, KERNEL, *ON_GPU])
fast_backends = pytest.mark.parametrize('backend', [SCAN, KERNEL, *ON_GPU])
both_directions = pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
LENGTHS = [1, 2, 3, 4, 5, 7, 16, 63, 64, 65, 127, 1000]
HALF = [torch.float16, torch.bfloat16]


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
    function, device = backend
    inputs = [x.detach().to(device).requires_grad_() for x in (w, u, k, v)]
    y = function(*inputs, causal)
    gradients = torch.autograd.grad(y, inputs, gy.to(device), materialize_grads=True)
    return [x.detach().cpu() for x in (y, *gradients)]


def relative_error(got, expected):
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item() if difference else 0.0


# --- Values -----------------------------------------------------------------------------------


@all_backends
def test_values_worked_out_by_hand(backend):
    """w = ln 2 halves a weight per step, u = ln 3 triples the token's own."""
    function, device = backend
    w, u, log2 = torch.tensor([math.log(2)]), torch.tensor([math.log(3)]), math.log(2)
    k = torch.tensor([0.0, log2, 0.0]).reshape(1, 3, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1)
    # Weights of the three tokens, for each output token; e^k is 1, 2, 1.
    weights = torch.tensor([[3, 2, 1 / 2], [1, 6, 1], [1 / 2, 2, 3]])
    expected = (weights @ v[0]) / weights.sum(1, keepdim=True)
    y = function(w.to(device), u.to(device), k.to(device), v.to(device)).cpu()
    torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=0)

    past = weights.tril()
    expected = (past @ v[0]) / past.sum(1, keepdim=True)
    y = function(w.to(device), u.to(device), k.to(device), v.to(device), causal=True).cpu()
    torch.testing.assert_close(y[0], expected, rtol=1e-6, atol=0)


@all_backends
def test_one_token_attends_to_itself(backend):
    w, u, k, v, gy = make_inputs(1)
    y, gw, gu, gk, gv = run(backend, w, u, k, v, gy)
    torch.testing.assert_close(y, v, rtol=1e-6, atol=0)
    torch.testing.assert_close(gv, gy, rtol=1e-6, atol=0)
    # Rounding of y only: nothing else could move the output.
    for gradient in (gw, gu, gk):
        assert gradient.abs().max() < 1e-6


@all_backends
@both_directions
@pytest.mark.parametrize('tokens', LENGTHS)
def test_float64_equals_dense(backend, causal, tokens):
    if backend[0] is bi_wkv_reference and tokens > 127:
        tokens = 200  # loops under autograd are slow
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


@fast_backends
@both_directions
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_total'),
    [
        *((tokens, k_max, w) for tokens in (64, 300) for k_max in (1, 30) for w in (0, 5, 30, -30)),
        (65536, 30, 30),
        (65536, 1, -30),
    ],
)
def test_float32_accuracy(backend, causal, tokens, w_total, k_max):
    """The bar of the project: 1e-5 relative while |k| <= 30 and |w| T <= 30, gradients included."""
    shape = (16, 2) if tokens <= 1000 else (2, 1)
    w, u, k, v, gy = make_inputs(tokens, *shape, k_max=k_max, w_total=w_total, seed=tokens)
    # Not the first tokens of a long causal run: their outputs nearly equal v, so that their share
    # in gu, v - y, is all rounding, and of a few sampled tokens it would be the largest.
    rows = sampled_rows(tokens, ends=False)
    chosen = torch.zeros_like(gy)
    chosen[:, rows] = gy[:, rows]
    results = run(backend, w, u, k, v, chosen, causal)
    results[0] = results[0][:, rows]
    truths = dense_with_gradients(w, u, k, v, gy[:, rows], causal, rows)
    for name, got, expected in zip(('y', 'gw', 'gu', 'gk', 'gv'), results, truths, strict=True):
        assert relative_error(got, expected) <= 1e-5, name


@fast_backends
@both_directions
@pytest.mark.parametrize('dtype', HALF, ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('tokens', [1, 7, 65, 1000])
def test_half_types_round_once(backend, causal, dtype, tokens):
    """Half types: the float64 result of the same inputs, rounded once, plus the float32 bar."""
    inputs = make_inputs(tokens, k_max=8, w_total=8, dtype=dtype)
    results, truths = run(backend, *inputs, causal), dense_with_gradients(*inputs, causal)
    for name, got, expected in zip(('y', 'gw', 'gu', 'gk', 'gv'), results, truths, strict=True):
        assert got.dtype == (torch.float32 if name in ('gw', 'gu') else dtype)
        rounding = (expected.to(got.dtype).double() - expected).norm()
        # y is kept in two halves for the gradients: 16 bits of bfloat16, so that 2e-5 joins 1e-5.
        bar = 1e-5 if name in ('y', 'gv') else 3e-5
        # For T = 1 the truth is 0, and an error may be as large as a rounding of v.
        scale = max(expected.norm(), 0.1 * inputs[4].double().norm())
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * scale, name


@fast_backends
@pytest.mark.parametrize('dtype', HALF, ids=['float16', 'bfloat16'])
def test_half_types_on_long_sequences(backend, dtype):
    """The same bars for T = 65,536, where sums in half precision would be lost."""
    w, u, k, v, gy = make_inputs(65536, 2, 1, k_max=8, w_total=8, dtype=dtype)
    rows = sampled_rows(65536)
    chosen = torch.zeros_like(gy)
    chosen[:, rows] = gy[:, rows]
    results = run(backend, w, u, k, v, chosen)
    results[0] = results[0][:, rows]
    truths = dense_with_gradients(w, u, k, v, gy[:, rows], rows=rows)
    for name, got, expected in zip(('y', 'gw', 'gu', 'gk', 'gv'), results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if name in ('y', 'gv') else 3e-5
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * expected.norm(), name


@fast_backends
@both_directions
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_step'),
    [
        *(
            (tokens, k_max, w)
            for tokens in (1, 2, 3, 17, 300)
            for k_max in (1, 1e4)
            for w in (1e-3, 1e3, -1e-3, -1e3)
        ),
        (65536, 1, -1e3),
        (65536, 1e4, 1e3),
        (65536, 1e4, -1e-3),
    ],
)
def test_extremes_stay_finite_and_accurate(backend, causal, tokens, k_max, w_step):
    """Beyond |k| = 30 or |w| T = 30 the error may grow in proportion, and never to NaN or Inf."""
    w, u, k, v, gy = make_inputs(tokens, 2, 1, k_max=k_max, seed=tokens)
    w = torch.full_like(w, w_step)
    rows = sampled_rows(tokens)
    chosen = torch.zeros_like(gy)
    chosen[:, rows] = gy[:, rows]
    results = run(backend, w, u, k, v, chosen, causal)
    assert all(torch.isfinite(x).all() for x in results)
    results[0] = results[0][:, rows]
    truths = dense_with_gradients(w, u, k, v, gy[:, rows], causal, rows)
    growth = max(1.0, k_max / 30, abs(w_step) * tokens / 30)
    # A gradient that vanishes (one token takes all the weight) is right to a rounding of its terms,
    # gy v, which gw has times a distance.
    terms = (gy[:, rows].double().norm() * v.double().norm()).item() / math.sqrt(v.numel())
    scales = (0.0, terms * tokens, terms, terms, 0.0)
    for name, got, expected, scale in zip(
        ('y', 'gw', 'gu', 'gk', 'gv'), results, truths, scales, strict=True
    ):
        error = (got.double() - expected).norm().item()
        assert error <= min(1.0, 1e-5 * growth) * max(expected.norm().item(), scale), name


@fast_backends
@both_directions
@pytest.mark.parametrize('w_step', [1e6, -1e6], ids=['decay', 'growth'])
def test_finite_far_beyond_the_limits(backend, causal, w_step):
    """Here exponents are wrong by hundreds, e^100 overflows, and weights must stay below 1."""
    w, u, k, v, gy = make_inputs(3000, 4, 1, k_max=1e6)
    results = run(backend, torch.full_like(w, w_step), u, k, v, gy, causal)
    assert all(torch.isfinite(x).all() for x in results)


@fast_backends
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_values_near_the_largest_float(backend, dtype):
    """A mean of large values is no larger, though their sum would overflow."""
    w, u, k, v, _ = make_inputs(300, 2, 1, dtype=dtype)
    v = torch.full_like(v, torch.finfo(dtype).max / 2)
    function, device = backend
    y = function(*(x.to(device) for x in (w, u, k, v)))
    torch.testing.assert_close(y.cpu(), v, rtol=1e-5 if dtype == torch.float32 else 0, atol=0)


@fast_backends
@both_directions
def test_nan_shows_in_all_gradients_that_it_enters(backend, causal):
    """All of its channel take part in the output of the last token, which has seen it."""
    w, u, k, v, gy = make_inputs(20, 3, 1)
    k[0, 10, 1] = math.nan
    _, gw, gu, gk, gv = run(backend, w, u, k, v, gy, causal)
    assert all(x[..., 1].isnan().all() for x in (gw, gu, gk, gv))
    assert all(x[..., [0, 2]].isfinite().all() for x in (gw, gu, gk, gv))


@fast_backends
def test_nan_stays_where_its_weight_reaches(backend):
    """A NaN in one channel, or in the future of a causal run, leaves the others alone."""
    function, device = backend
    w, u, k, v, _ = (x.to(device) for x in make_inputs(40))
    clean = function(w, u, k, v, causal=True)
    k[0, 20, 1] = math.nan
    y = function(w, u, k, v, causal=True)
    assert y[0, 20:, 1].isnan().all()
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 20:, 1] = True
    assert torch.equal(y[~reached], clean[~reached])


# --- Layouts ----------------------------------------------------------------------------------


def _transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _strided(x):
    return torch.stack([x, torch.full_like(x, math.nan)], dim=-1).flatten(-2)[..., ::2]


def _batch_last(x):
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@all_backends
@pytest.mark.parametrize('layout', [_transposed, _strided, _batch_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_strides_do_not_matter(backend, layout, dtype):
    function, device = backend
    w, u, k, v, gy = (x.to(device) for x in make_inputs(21, 40, dtype=dtype))
    expected = run(backend, w, u, k, v, gy)
    inputs = [_strided(w[None])[0], _strided(u[None])[0], layout(k), layout(v)]
    inputs = [x.requires_grad_() for x in inputs]
    assert not inputs[2].is_contiguous()
    y = function(*inputs)
    assert y.is_contiguous()
    gradients = torch.autograd.grad(y, inputs, layout(gy))
    for got, want in zip((y, *gradients), expected, strict=True):
        # The same sums; other vector widths may round otherwise, in the last places.
        torch.testing.assert_close(got.cpu(), want, rtol=1e-2 if dtype in HALF else 1e-5, atol=1e-5)


@all_backends
def test_expanded_inputs(backend):
    """Broadcast k, v and output gradient (``y.sum().backward()`` gives strides of 0)."""
    function, device = backend
    w, u, k, v, _ = make_inputs(9, 33, 1)
    leaves = [x.to(device).requires_grad_() for x in (w, u, k, v)]
    y = function(*leaves[:2], leaves[2].expand(3, -1, -1), leaves[3].expand(3, -1, -1))
    y.sum().backward()
    truths = dense_with_gradients(
        w, u, *(x.expand(3, -1, -1) for x in (k, v)), torch.ones(3, 9, 33)
    )
    truths[3:] = [x.sum(0, keepdim=True) for x in truths[3:]]
    for got, expected in zip((y, *(x.grad for x in leaves)), truths, strict=True):
        torch.testing.assert_close(got.detach().cpu().double(), expected, rtol=1e-4, atol=1e-5)


@all_backends
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64])
def test_empty_batch(backend, dtype):
    y, gw, gu, gk, gv = run(backend, *make_inputs(5, 3, 0, dtype=dtype))
    assert y.shape == gk.shape == gv.shape == (0, 5, 3) and y.dtype == dtype
    assert torch.equal(gw, torch.zeros_like(gw)) and torch.equal(gu, torch.zeros_like(gu))


@fast_backends
@pytest.mark.parametrize('channels', [1, 2, 31, 33, 70])
@pytest.mark.parametrize('batch', [1, 3])
def test_any_number_of_channels(backend, batch, channels):
    inputs = make_inputs(19, channels, batch, dtype=torch.float64)
    for got, expected in zip(run(backend, *inputs), dense_with_gradients(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# --- Guarantees -------------------------------------------------------------------------------


@fast_backends
@pytest.mark.parametrize('shape', [(2, 300, 5), (1, 4096, 1), (1, 16384, 3)])
def test_two_runs_give_the_same_bits(backend, shape):
    batch, tokens, channels = shape
    inputs = make_inputs(tokens, channels, batch)
    first = run(backend, *inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(backend, *inputs), strict=True))
    finally:
        torch.set_num_threads(threads)


@fast_backends
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_every_output_element_is_written(backend, dtype):
    """With fresh memory full of NaN, results stay the same."""
    inputs = make_inputs(130, 37, dtype=dtype)
    expected = run(backend, *inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = run(backend, *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@fast_backends
@both_directions
def test_gradcheck(backend, causal):
    function, device = backend
    inputs = make_inputs(6, 3, 2, dtype=torch.float64)[:4]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: function(*x, causal), inputs)


@fast_backends
def test_second_derivative_says_that_there_is_none(backend):
    function, device = backend
    w, u, k, v, _ = (x.to(device).requires_grad_() for x in make_inputs(4))
    (gk,) = torch.autograd.grad(function(w, u, k, v).square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match='once'):
        gk.sum().backward()


@fast_backends
@pytest.mark.parametrize('wanted', ['w', 'u', 'k', 'v'])
def test_gradient_of_one_input_only(backend, wanted):
    function, device = backend
    inputs = {name: x.to(device) for name, x in zip('wukv', make_inputs(11), strict=False)}
    gy = make_inputs(11)[4].to(device)
    inputs[wanted].requires_grad_()
    function(**inputs).backward(gy)
    truths = dict(zip('wukv', dense_with_gradients(*make_inputs(11))[1:], strict=False))
    torch.testing.assert_close(
        inputs[wanted].grad.cpu().double(), truths[wanted], rtol=1e-4, atol=1e-5
    )


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
