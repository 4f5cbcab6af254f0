"""Bi-WKV6: values and gradients against a dense float64 formula and upstream's kernel."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vrwkv_ops import bi_wkv6
from vrwkv_ops.reference import bi_wkv6_reference

from .backends import is_quick_kernel, on
from .dense_bi_wkv6 import dense_bi_wkv6

GOLDEN = Path(__file__).parents[1] / 'data/golden/wkv6_operator.pt'


def make(batch, tokens, heads, size, mean=-2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    r, k, v, w = (normal(batch, tokens, heads * size) for _ in range(4))
    inputs = [r, k, v, (w + mean).to(torch.float32).double(), normal(heads, size)]
    inputs = [x.to(dtype) for x in inputs]
    return inputs, normal(batch, tokens, heads * size).to(dtype)


def run(function, inputs, gy, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy, materialize_grads=True)]


def run_on(backend, inputs, gy, **options):
    """The same on a backend's device."""
    inputs, gy = [x.to(backend.device) for x in inputs], gy.to(backend.device)
    return [x.cpu() for x in run(backend.function('bi_wkv6'), inputs, gy, **options)]


def errors(results, truth):
    """Relative errors of y, gr, gk, gv, gw and gu; absolute ones where all is 0."""
    return [
        ((a.double() - b).norm() / (b.norm() if b.norm() > 1e-12 else 1)).item()
        for a, b in zip(results, truth, strict=True)
    ]


@on('mean', [-20, -6, 0, 3, 6, 20, 90], only=is_quick_kernel)
def test_accuracy_in_float32_at_every_decay(backend, mean):
    """The bar is five roundings of float32; T passes the edges of chunks."""
    inputs, gy = make(2, 50, 2, 16, mean, torch.float32)
    truth = run(dense_bi_wkv6, [x.double() for x in inputs], gy.double())
    results = run_on(backend, inputs, gy)
    assert all(x.isfinite().all() for x in results)
    assert max(errors(results, truth)) < 6e-7


@on(only=is_quick_kernel)
def test_infinite_decays(backend):
    """A token with w = inf lets nothing pass, one with -inf everything."""
    inputs, gy = make(1, 20, 1, 8, dtype=torch.float32)
    inputs[3][:, 3] = float('inf')
    inputs[3][:, 7] = float('-inf')
    results = run_on(backend, inputs, gy)
    assert all(x.isfinite().all() for x in results)
    finite = [x.double() for x in inputs]
    finite[3] = finite[3].clamp(-700, 700)
    assert max(errors(results, run(dense_bi_wkv6, finite, gy.double()))) < 6e-7


def test_equals_upstreams_kernel():
    """Upstream's own gradient of w is exact to 3e-6, by differences; the others to 2e-7."""
    data = torch.load(GOLDEN, weights_only=True)
    inputs = [data['inputs'][name] for name in 'rkvwu']
    y, *grads = run(bi_wkv6, inputs, data['gy'])
    expected = [data['y'], *(data['grads'][name] for name in 'rkvwu')]
    bars = [1e-6, 1e-6, 1e-6, 1e-6, 1e-5, 1e-6]
    for error, bar in zip(errors([y, *grads], [x.double() for x in expected]), bars, strict=True):
        assert error < bar


@pytest.mark.parametrize('causal', [False, True])
def test_more_tokens_than_upstream_can_train_with(causal):
    """Three segments of the CPU's backward pass."""
    inputs, gy = make(1, 2100, 1, 8, dtype=torch.float32)
    truth = run(bi_wkv6_reference, [x.double() for x in inputs], gy.double(), causal=causal)
    assert max(errors(run(bi_wkv6, inputs, gy, causal=causal), truth)) < 1e-6


def test_directions():
    """Every token sees all others; a causal one those before it; reversal reverses."""
    inputs, _ = make(1, 20, 1, 8)
    for causal in (False, True):
        v = inputs[2].clone().requires_grad_()
        y = bi_wkv6(inputs[0], inputs[1], v, *inputs[3:], causal=causal)
        (grad,) = torch.autograd.grad(y[0, 10].sum(), v)
        seen = grad[0].any(1)
        assert seen[:11].all() and seen[11:].any() is not causal
        assert bool(seen[11:].all()) is not causal
    y = bi_wkv6(*inputs)
    back = bi_wkv6(*(x.flip(1) for x in inputs[:4]), inputs[4])
    torch.testing.assert_close(back.flip(1), y, rtol=1e-12, atol=1e-12)


def test_autocast_computes_in_float32():
    inputs, _ = make(1, 20, 1, 8, dtype=torch.float32)
    half = [x.bfloat16() for x in inputs[:3]]
    with torch.autocast('cpu', torch.bfloat16):
        y = bi_wkv6(*half, *inputs[3:])
    assert y.dtype == torch.float32
    assert torch.equal(y, bi_wkv6(*(x.float() for x in half), *inputs[3:]))


def test_compiles_into_one_graph_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(bi_wkv6, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (20, 35):
        inputs, gy = make(2, tokens, 1, 8, dtype=torch.float32)
        for a, b in zip(run(compiled, inputs, gy), run(bi_wkv6, inputs, gy), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def wrong(**changes):
    arguments = dict(zip('rkvwu', make(2, 6, 2, 8, dtype=torch.float32)[0], strict=True))
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (wrong(r=None), TypeError, "'r' must be a torch.Tensor, got NoneType"),
        (wrong(k=torch.zeros(2, 6, 16).long()), TypeError, "'k' has dtype torch.int64"),
        (wrong(r=torch.zeros(6, 16)), ValueError, r"'r' must have shape \(B, T, C\), got \(6, 16"),
        (wrong(v=torch.zeros(2, 5, 16)), ValueError, r"'v' .*\(2, 6, 16\), got \(2, 5, 16\)"),
        (wrong(w=torch.zeros(16)), ValueError, r"'w' .*\(2, 6, 16\), got \(16,\)"),
        (wrong(u=torch.zeros(16)), ValueError, r"'u' .*16 channels .*got \(16,\)"),
        (wrong(u=torch.zeros(3, 8)), ValueError, r"'u' .*16 channels .*got \(3, 8\)"),
        (wrong(u=torch.zeros(4, 4)), ValueError, 'multiple of 8, got 4'),
        (
            {name: torch.zeros(1, 2, 72) for name in 'rkvw'} | dict(u=torch.zeros(1, 72)),
            ValueError,
            'at most 64 channels, .* got 72',
        ),
        (wrong(k=torch.zeros(2, 6, 16).half()), TypeError, "'r', 'k' and 'v' must have one dtype"),
        (wrong(w=torch.zeros(2, 6, 16, device='meta')), ValueError, "'w' is on meta"),
        (wrong(causal=1), TypeError, "'causal' must be a bool, got int"),
    ],
)
@pytest.mark.parametrize('function', [bi_wkv6, bi_wkv6_reference])
def test_wrong_calls(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)
