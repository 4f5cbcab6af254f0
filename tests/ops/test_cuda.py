"""What only a GPU can show: streams, devices, graphs, large sizes. `make gpu` runs these tests."""

import pytest
import torch

from vrwkv_ops import bi_wkv, q_shift, scan, token_shift
from vrwkv_ops.benchmarking import replay

from .operators import DTYPES

pytestmark = pytest.mark.cuda


def make_inputs(shape, dtype=torch.float32, device='cuda', seed=0):
    """Random w, u, k, v and output gradient."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = (torch.rand(shape[-1], generator=generator, dtype=torch.float64) * 16 - 8) / shape[1]
    u = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    k, v, gy = torch.randn(3, *shape, generator=generator, dtype=torch.float64) * 2
    return [x.to(device, wide) for x in (w, u)] + [x.to(device, dtype) for x in (k, v, gy)]


def run(w, u, k, v, gy):
    """Output and the gradients of w, u, k and v."""
    inputs = [x.detach().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, gy, materialize_grads=True)]


def check(results, truths, dtype):
    """One rounding of the float64 result plus the bars of test_bi_wkv.py."""
    bars = {torch.float64: [1e-11] * 5, torch.float32: [1e-5] * 5}
    for i, (got, expected) in enumerate(zip(results, truths, strict=True)):
        bar = bars.get(dtype, [1e-5, 3e-5, 3e-5, 3e-5, 1e-5])[i]
        rounding = (expected.to(got.dtype).double() - expected).norm()
        scale = max(expected.norm(), 0.1 * truths[0].norm())  # a gradient may be 0
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * scale, i


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('tokens', [4096, 16384, 65536])
def test_long_sequences(dtype, tokens):
    """Against the scan in float64, which test_bi_wkv.py holds against the dense formula."""
    w, u, k, v, gy = inputs = make_inputs((1, tokens, 33), dtype)
    wide = [x.double() for x in (w, u, k, v)]
    y, z = scan.forward(*wide, False)
    check(run(*inputs), [y, *scan.backward(gy.double(), *wide, y, z, False)], dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_current_stream(dtype):
    """Kernels wait for the stream that made their inputs, and not for another one."""
    expected = run(*make_inputs((2, 300, 33), dtype))
    stream = torch.cuda.Stream()
    sleep, size = 100_000_000, torch.Size((2, 300, 33))
    with torch.cuda.stream(stream):
        w, u, k, v, gy = make_inputs(size, dtype)
        late = [torch.zeros_like(x) for x in (k, v, gy)]
        torch.cuda._sleep(sleep)  # the inputs become right long after the launches below
        for zero, x in zip(late, (k, v, gy), strict=True):
            zero.copy_(x)
        results = run(w, u, *late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_device_that_is_not_the_current_one():
    """The last GPU, while the first is the current one (the same where there is only one)."""
    device = torch.device('cuda', torch.cuda.device_count() - 1)
    expected = [x.cpu() for x in run(*make_inputs((2, 70, 33)))]
    x = torch.randn(2, 70, 33)
    with torch.cuda.device(0):
        results = run(*make_inputs((2, 70, 33), device=device))
        shifted = q_shift(x.to(device), (7, 10))
        (mixed,) = token_shift(x.to(device), torch.ones(1, 33, device=device), (7, 10))
        assert torch.cuda.current_device() == 0
    assert all(r.device == device for r in (*results, shifted, mixed))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(results, expected, strict=True))
    assert torch.equal(shifted.cpu(), q_shift(x, (7, 10)))
    assert torch.equal(mixed.cpu(), x)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('tokens', [196, 1024])
def test_cuda_graph(dtype, tokens):
    """Captured once, replayed on other inputs, forward and backward."""
    w, u, k, v, gy = make_inputs((2, tokens, 33), dtype)
    mixes = torch.rand(2, 33, device='cuda')
    leaves = [x.requires_grad_() for x in (w, u, k, v, mixes)]

    def step():
        shifted, other = token_shift(k, mixes, (tokens // 2, 2))
        y = bi_wkv(w, u, shifted, v)
        return [y, *torch.autograd.grad([y, other], leaves, [gy, gy])]

    results = []
    call = replay(lambda: results.append(step()), torch.device('cuda'))
    captured = results[-1]
    with torch.no_grad():
        for old, new in zip((w, u, k, v, gy), make_inputs((2, tokens, 33), dtype, seed=1)):  # noqa: B905
            old.copy_(new)
    call()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_more_than_two_to_the_31_elements():
    """Every image is the same, so every image of the result is: the last one has offsets > 2^31."""
    tokens, channels = 1024, 64
    batch = 2**31 // (tokens * channels) + 1
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip('needs 48 GiB of free GPU memory')
    w, u, k, v, gy = make_inputs((1, tokens, channels), torch.bfloat16)
    wide = [x.expand(batch, -1, -1).contiguous() for x in (k, v, gy)]
    results = run(w, u, *wide)
    expected = run(w, u, k, v, gy)
    for index in (0, 3, 4):  # y, gk, gv
        assert torch.equal(results[index][-1], expected[index][0])
        assert torch.equal(results[index][batch // 2], expected[index][0])
    for index in (1, 2):  # gw, gu: added in float64
        torch.testing.assert_close(results[index], expected[index] * batch, rtol=1e-4, atol=1e-2)
    del results
    shifted = q_shift(wide[0], (32, 32))
    assert torch.equal(shifted[-1], q_shift(k, (32, 32))[0])
    del shifted
    (mixed,) = token_shift(wide[0], torch.rand(1, channels, device='cuda'), (32, 32))
    assert torch.equal(mixed[-1], mixed[0])
