"""The fused token shift: every backend against shifted and mixed images, and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from vrwkv_ops import q_shift, shift, token_shift
from vrwkv_ops.checks import accumulation_dtype, check_token_shift
from vrwkv_ops.reference import token_shift_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class _Slices(torch.autograd.Function):
    """The pure-PyTorch kernels, called past the dispatcher."""

    @staticmethod
    def forward(ctx, x, mixes, *args):
        ctx.save_for_backward(x, mixes)
        ctx.args = args
        return tuple(shift.forward(x, mixes, *args))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return (*shift.backward(grads, *ctx.saved_tensors, *ctx.args), *[None] * 5)


def token_shift_slices(
    x, mixes, resolution=None, shift_pixel=1, channel_gamma=1 / 4, mode='q_shift'
):
    check_token_shift(x, mixes, resolution, shift_pixel, channel_gamma, mode)
    mixes = torch.stack([mix.reshape(-1) for mix in mixes]).to(accumulation_dtype(x.dtype))
    grid = resolution if mode == 'q_shift' else (1, x.shape[1])
    return _Slices.apply(x, mixes, *grid, shift_pixel, channel_gamma or 0, mode)


all_backends = pytest.mark.parametrize(
    'backend',
    [
        pytest.param((token_shift_reference, 'cpu'), id='reference'),
        pytest.param((token_shift_slices, 'cpu'), id='slices'),
        pytest.param((token_shift, 'cpu'), id='kernel-cpu'),
        pytest.param((token_shift, 'cuda'), id='kernel-cuda', marks=pytest.mark.cuda),
    ],
)
operator = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
modes = pytest.mark.parametrize('mode', ['q_shift', 'single_shift', 'double_shift'])


def truth(x, mixes, resolution, shift_pixel, channel_gamma, mode):
    """Crops of a zero-padded image (design section 3), mixed; differentiable by autograd."""
    channels, s = x.shape[2], shift_pixel
    height, width = resolution if mode == 'q_shift' else (1, x.shape[1])
    image = x.reshape(x.shape[0], height, width, channels)
    padded = F.pad(image, (0, 0, s, s, s, s))
    left, right, above, below, here = (
        padded[:, row : row + height, column : column + width]
        for row, column in ((s, 0), (s, 2 * s), (0, s), (2 * s, s), (s, s))
    )
    ends = [int(channels * (channel_gamma or 0) * n) for n in range(5)]
    if mode == 'single_shift':
        shifted = left
    elif mode == 'double_shift':
        parts = [left[..., : ends[1]], right[..., ends[1] : ends[2]], here[..., ends[2] :]]
        shifted = torch.cat(parts, -1)
    else:
        sources = (left, right, above, below)
        parts = [y[..., ends[n] : ends[n + 1]] for n, y in enumerate(sources)]
        shifted = torch.cat([*parts, here[..., ends[4] :]], -1)
    mixes = [mix.reshape(-1) for mix in mixes]
    return [(image * mix + shifted * (1 - mix)).reshape(x.shape) for mix in mixes]


def make_inputs(resolution, channels, batch=2, count=3, dtype=torch.float32, device='cpu'):
    tokens = resolution[0] * resolution[1]
    generator = torch.Generator().manual_seed(tokens + channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x = normal(batch, tokens, channels).to(dtype)
    mixes = [normal(1, 1, channels).to(accumulation_dtype(dtype)) for _ in range(count)]
    grads = [normal(batch, tokens, channels).to(dtype) for _ in range(count)]
    return x, mixes, grads


def run(function, x, mixes, grads, *args):
    """Results and the gradients of x and the mixes."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *mixes)]
    results = function(leaves[0], leaves[1:], *args)
    gradients = torch.autograd.grad(results, leaves, [g.to(results[0].dtype) for g in grads])
    return [*(y.detach() for y in results), *gradients]


def compare(backend, x, mixes, grads, *args):
    results = run(backend, x, mixes, grads, *args)
    truths = run(truth, x.double(), [mix.double() for mix in mixes], grads, *args)
    for i, (got, expected) in enumerate(zip(results, truths, strict=True)):
        assert got.dtype == (x.dtype if i <= len(mixes) else mixes[0].dtype)
        assert got.is_contiguous()
        # Rounded once at the end, on top of some roundings of the accumulation dtype.
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-14 if x.dtype == torch.float64 else 1e-6
        error = (got.double() - expected).norm()
        assert error <= 1.001 * rounding + bar * expected.norm(), i


@all_backends
@modes
@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_results_and_gradients(backend, dtype, count, mode):
    function, device = backend
    inputs = make_inputs((3, 5), 41, count=count, dtype=dtype, device=device)
    compare(function, *inputs, (3, 5), 1, 1 / 4, mode)


@all_backends
@modes
@pytest.mark.parametrize('shift_pixel', [0, 2, 5, 40])
@pytest.mark.parametrize(
    ('resolution', 'channels', 'gamma'),
    [((1, 1), 4, 1 / 4), ((5, 4), 10, 1 / 4), ((1, 7), 33, 1 / 8), ((9, 11), 64, 1 / 4)],
)
def test_sizes(backend, resolution, channels, gamma, shift_pixel, mode):
    """Steps beyond the grid, groups of uneven size, channels past them; two pieces of rows."""
    function, device = backend
    inputs = make_inputs(resolution, channels, count=2, device=device)
    compare(function, *inputs, resolution, shift_pixel, gamma, mode)


@all_backends
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(backend, dtype):
    """Inputs and gradients are read in place, in any layout."""
    function, device = backend
    x, mixes, grads = make_inputs((3, 5), 20, count=2, dtype=dtype, device=device)
    layouts = (
        lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
        lambda y: torch.stack([y, torch.full_like(y, math.nan)], -1).flatten(-2)[..., ::2],
        lambda y: y.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    )
    expected = run(function, x, mixes, grads, (3, 5))
    for layout in layouts:
        assert not layout(x).is_contiguous()
        results = run(function, layout(x), mixes, [layout(grad) for grad in grads], (3, 5))
        for got, want in zip(results[:3], expected[:3], strict=True):
            assert torch.equal(got, want)  # the very same arithmetic
        for got, want in zip(results[3:], expected[3:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # of another order, perhaps
    shared = grads[0][:1, :1].expand_as(x)  # strides of 0, as y.sum().backward() gives
    results = run(function, x, mixes, [shared, shared], (3, 5))
    expected = run(function, x, mixes, [shared.contiguous()] * 2, (3, 5))
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want)


@all_backends
@modes
def test_empty_batch(backend, mode):
    function, device = backend
    x, mixes, grads = make_inputs((2, 3), 8, batch=0, device=device)
    *results, gx, first, second, third = run(function, x, mixes, grads, (2, 3), 1, 1 / 4, mode)
    assert all(y.shape == (0, 6, 8) for y in (*results, gx))
    assert not any(gmix.any() for gmix in (first, second, third))


@all_backends
def test_mixes_of_any_form(backend):
    """One tensor (n, C), vectors, and the layers' parameters of shape (1, 1, C) mean the same."""
    function, device = backend
    x, mixes, _ = make_inputs((2, 3), 8, device=device)
    expected = function(x, mixes, (2, 3))
    vectors = [mix.flatten() for mix in mixes]
    halves = [mix.double() for mix in mixes]
    for form in (vectors, tuple(vectors), torch.stack(vectors), halves):
        for got, want in zip(function(x, form, (2, 3)), expected, strict=True):
            assert torch.equal(got, want)


@operator
def test_a_mix_of_one_or_zero_is_exact(device):
    """No rounding where nothing is mixed: upstream's ``init_mode='local'`` starts so."""
    x = torch.randn(2, 12, 8, device=device)
    mixes = torch.stack([torch.ones(8), torch.zeros(8)]).to(device)
    stays, moves = token_shift(x, mixes, (3, 4))
    assert torch.equal(stays, x)
    assert torch.equal(moves, q_shift(x, (3, 4)))


@operator
@modes
def test_gradcheck(device, mode):
    x, mixes, _ = make_inputs((2, 3), 9, batch=1, dtype=torch.float64, device=device)
    leaves = [leaf.requires_grad_() for leaf in (x, *mixes)]
    assert torch.autograd.gradcheck(
        lambda x, *mixes: token_shift(x, mixes, (2, 3), 1, 1 / 4, mode), leaves
    )


@operator
def test_only_what_takes_part_has_a_gradient(device):
    """Results that are not used, and inputs that need no gradient, are left out."""
    x, mixes, grads = make_inputs((3, 5), 12, device=device)
    x.requires_grad_()
    first, _, third = token_shift(x, mixes, (3, 5))
    assert not mixes[0].requires_grad
    (gx,) = torch.autograd.grad([first, third], x, [grads[0], grads[2]])
    expected = run(token_shift, x, mixes[::2], grads[::2], (3, 5))[2]
    torch.testing.assert_close(gx, expected)


@operator
def test_second_derivative_says_that_there_is_none(device):
    x, mixes, _ = make_inputs((2, 3), 8, device=device)
    x.requires_grad_()
    (y, *_) = token_shift(x, mixes, (2, 3))
    (gx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='token_shift is differentiable once'):
        gx.sum().backward()


@operator
def test_same_bits_for_any_number_of_threads(device):
    inputs = make_inputs((33, 40), 24, batch=3, device=device)
    first = run(token_shift, *inputs, (33, 40))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(token_shift, *inputs, (33, 40))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@operator
def test_every_output_element_is_written(device):
    inputs = make_inputs((5, 7), 33, device=device)
    expected = run(token_shift, *inputs, (5, 7), 2, 0.2)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        results = run(token_shift, *inputs, (5, 7), 2, 0.2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_nothing_but_the_inputs_is_saved():
    x, mixes, _ = make_inputs((3, 4), 8)
    mixes = torch.stack([mix.flatten() for mix in mixes]).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        token_shift(x, mixes, (3, 4))
    assert {y.data_ptr() for y in saved} == {x.data_ptr(), mixes.data_ptr()}
