"""What only the CUDA kernels have, in the emulator: ways, tilings, launches and barriers."""

import pytest
import torch

from vrwkv_ops import bi_wkv

from .dense_bi_wkv import dense_with_gradients
from .emulated_cuda import load
from .operators import OPERATORS

NAMES = ('y', 'gw', 'gu', 'gk', 'gv')
H100 = 227  # KiB of shared memory for a block


@pytest.fixture(scope='module')
def library():
    """The operators of csrc/*/cuda.cu, for tensors on the CPU."""
    return load()


@pytest.fixture(autouse=True)
def device(library):
    """Sets the device's shared memory in KiB and the order of threads; at first an H100's."""

    def set_device(kib=H100, is_reversed=False):
        library.set_device(kib << 10, is_reversed)

    set_device()
    library.take_counts()
    yield set_device
    set_device()


def run(library, w, u, k, v, gy, causal=False):
    """Output and gradients of w, u, k and v, as vrwkv_ops.bi_wkv computes them on CUDA.

    Also whether the careful way was taken, forward and backward.
    """
    y, residual, z = library.bi_wkv_forward(w, u, k, v, causal, True)
    forward, _ = library.take_counts()
    gw, gu, gk, gv = library.bi_wkv_backward(gy, w, u, k, v, y, residual, z, causal)
    backward, _ = library.take_counts()
    return (y, gw, gu, gk, gv), (forward > 0, backward > 0)


def make_inputs(shape, dtype=torch.float32, k_max=3.0, w_total=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, gy = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    k = (k * k_max / 3).clamp(-k_max, k_max)
    w = torch.tensor([1.0, 0.0, -0.5]).repeat(shape[2])[: shape[2]] * w_total / shape[1]
    u = torch.randn(shape[2], generator=generator)
    return w, u, *(x.to(dtype) for x in (k, v, gy))


def cpu_errors(w, u, k, v, gy, causal, truths):
    """Norms of the errors of the CPU kernels."""
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves, causal=causal)
    results = (y.detach(), *torch.autograd.grad(y, leaves, gy))
    errors = ((x.double() - truth).norm() for x, truth in zip(results, truths, strict=True))
    return dict(zip(NAMES, errors, strict=True))


def check(results, inputs, causal):
    """The bars of test_bi_wkv.py: float32's, and rounding once for half types."""
    dtype = inputs[2].dtype
    truths = dense_with_gradients(*inputs, causal)
    of_cpu = cpu_errors(*inputs, causal, truths)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if dtype.itemsize == 4 or name in ('y', 'gv') else 3e-5
        bar *= expected.norm()
        if name in ('gw', 'gu'):  # sums that may cancel: as far as float32 leaves the CPU's
            bar = max(bar, 2 * of_cpu[name])
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar, name


# Tokens, largest key, decay over the sequence, KiB of shared memory, and whether weights lie too
# far apart for one exponent, in the forward pass and in the backward one (None: in one direction).
CASES = {
    'shorter chunk': (31, 8, 8, H100, (False, False)),
    'one tile': (196, 8, 5, H100, (False, False)),
    'full tile': (256, 8, -5, H100, (False, False)),
    'shorter tile': (261, 3, 5, H100, (False, False)),
    'one warp': (45, 3, -5, 12, (False, False)),
    'more tiles than segments': (1100, 8, 30, 24, (False, False)),
    'growth': (1024, 8, -30, 99, (False, False)),
    'far keys': (1000, 30, 30, H100, (True, False)),
    'far keys, growth': (33, 30, -30, H100, (True, None)),
}


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize(('tokens', 'k_max', 'w_total', 'kib', 'is_far'), CASES.values(), ids=CASES)
def test_equals_dense(library, device, tokens, k_max, w_total, kib, is_far, dtype, causal):
    if dtype != torch.float32:  # as in test_bi_wkv.py
        w_total = max(min(w_total, 8), -8)
    device(kib)
    inputs = make_inputs((2, tokens, 3), dtype, k_max, w_total)
    results, careful = run(library, *inputs, causal)
    assert all(took is far for took, far in zip(careful, is_far, strict=True) if far is not None)
    check(results, inputs, causal)


@pytest.mark.parametrize('k_max', [3, 100], ids=['fast', 'careful'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_order_of_threads_does_not_matter(library, device, dtype, k_max):
    """A barrier that is missing lets a thread read what another has not written yet."""
    inputs = make_inputs((2, 600, 40), dtype, k_max)
    expected, _ = run(library, *inputs)
    device(is_reversed=True)
    results, _ = run(library, *inputs)
    assert all(map(torch.equal, results, expected))


def test_order_of_threads_does_not_matter_for_bi_wkv6(library, device):
    """Sequences of several chunks, one of them short."""
    call = OPERATORS['bi_wkv6'].make((2, 70, 80))
    inputs, results = list(call.inputs.values()), []
    for is_reversed in (False, True):
        device(is_reversed=is_reversed)
        y = library.bi_wkv6_forward(*inputs, False)
        results.append([y, *library.bi_wkv6_backward(*call.grads, *inputs, False)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(('tokens', 'kernels'), [(196, 1), (256, 1), (257, 3)])
def test_a_short_sequence_takes_one_kernel(library, tokens, kernels):
    """In the backward pass another one sums the gradients of decay and bonus."""
    w, u, k, v, gy = make_inputs((2, tokens, 32))
    y, residual, z = library.bi_wkv_forward(w, u, k, v, False, True)
    assert library.take_counts()[1] == kernels
    library.bi_wkv_backward(gy, w, u, k, v, y, residual, z, False)
    assert library.take_counts()[1] == 1 + kernels


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
def test_equals_cpu_kernels(library, device, tokens, k_max, w_total, bonus, is_far, causal):
    """Beyond the range in which errors are held to 1e-5, they grow no faster than exponents."""
    device(48)
    w, u, k, v, gy = make_inputs((2, tokens, 3), k_max=k_max, w_total=w_total)
    inputs = w, u + bonus, k, v, gy
    results, careful = run(library, *inputs, causal)
    assert careful == is_far
    check_like_cpu(results, inputs, causal)


def test_an_outlier_sends_one_warp_to_the_careful_way(library):
    """A warp takes 16 tokens of 32 channels, with its states and its outputs."""
    w, u, k, v, gy = make_inputs((1, 196, 32), k_max=3)
    k[0, 50, 7] = 90
    inputs = w, u, k, v, gy
    y, residual, z = library.bi_wkv_forward(w, u, k, v, False, True)
    assert library.take_counts()[0] == 2 * 32
    results = y, *library.bi_wkv_backward(gy, w, u, k, v, y, residual, z, False)
    check_like_cpu(results, inputs, False)


def test_jump_of_keys(library):
    """Products of e^k and e^(-z) that no float holds, of tokens that do not see each other."""
    w, u, k, v, gy = make_inputs((1, 45, 3))
    inputs = w, u, k + torch.where(torch.arange(45) < 7, -60.0, 60.0).view(1, -1, 1), v, gy
    results, careful = run(library, *inputs, causal=True)
    assert careful == (True, True)
    check_like_cpu(results, inputs, True)


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('w_step', [0.5, 0.05, -0.5, -1.3])
@pytest.mark.parametrize(('first', 'last'), [(30, 70), (43, 51), (0, 100), (20, 21)])
def test_both_ways_meet(library, device, first, last, w_step, causal):
    """States pass between the fast way and the careful one, within a tile and between tiles."""
    w, u, k, v, gy = make_inputs((2, 140, 3), k_max=10)
    k[:, first:last] += 40
    inputs = w * 0 + torch.tensor([1.0, 0.3, -0.2]) * w_step, u, k, v, gy
    for kib in (H100, 24):
        device(kib)
        results, _ = run(library, *inputs, causal)
        check_like_cpu(results, inputs, causal)


def check_like_cpu(results, inputs, causal):
    truths = dense_with_gradients(*inputs, causal)
    of_cpu = cpu_errors(*inputs, causal, truths)
    w, _, k, *_ = inputs
    far = max(1, k.abs().max() / 30, w.abs().max() * k.shape[1] / 30)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        # What exponents of this size allow; more for gw, a sum over all pairs that cancels.
        bar = max(2 * of_cpu[name], far * (3e-5 if name == 'gw' else 1e-5) * expected.norm())
        assert (got.double() - expected).norm() <= bar, name


def test_long_sequence(library):
    """Many tiles in each segment; against the CPU kernels, which others hold to float64."""
    inputs = make_inputs((1, 20000, 2))
    results, careful = run(library, *inputs)
    assert careful == (False, False)
    *leaves, gy = inputs
    leaves = [x.requires_grad_() for x in leaves]
    y = bi_wkv(*leaves)
    for got, want in zip(results, (y, *torch.autograd.grad(y, leaves, gy)), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_largest_values(library):
    """Sums of nearly the largest floats stay finite; equal values come out as they are."""
    k, gy = torch.zeros(2, 1, 300, 3)
    v = torch.full_like(k, 0.99 * torch.finfo(torch.float32).max)
    w, u = torch.tensor([0.01, -0.05, -1.3]), torch.tensor([0.0, 20.0, 0.0])
    (y, *_), careful = run(library, w, u, k, v, gy)
    assert not careful[0]
    # A few roundings of the sums.
    torch.testing.assert_close(y, v, rtol=2e-6, atol=0)
