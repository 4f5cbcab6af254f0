"""What every operator promises on every backend: values, gradients, layouts, the same bits."""

import contextlib
import itertools
import math

import pytest
import torch

from vrwkv_ops import backends

from .backends import BACKENDS, has_kernels, is_quick, is_quick_kernel, on
from .operators import DTYPES, HALF, OPERATORS, as_list

operators = pytest.mark.parametrize('operator', OPERATORS.values(), ids=OPERATORS)
WKV = ['bi_wkv', 'causal_bi_wkv']
WKV6 = ['bi_wkv6', 'causal_bi_wkv6']
SHIFTS = [name for name in OPERATORS if 'shift' in name]
POINTWISE = ['squared_relu', 'sigmoid_gate']
DEFORMABLE = [name for name in OPERATORS if 'deform' in name]
PAIR = [torch.float32, torch.bfloat16]


def same(results, expected):
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# --- Results and gradients --------------------------------------------------------------------

WKV_SHAPES = [
    *((1, 1, 1), (3, 2, 7), (1, 8, 4), (2, 9, 5), (1, 33, 3)),
    # Beside the sizes of chunks, warps and vectors; B * C is no multiple of 32.
    *((1, 33, 31), (3, 19, 70), (1, 40, 193), (2, 197, 33), (1, 999, 5)),
    # Whole blocks of 32 channels in aligned rows, full tiles and one token more, a rest of 8.
    *((2, 196, 64), (1, 256, 64), (1, 257, 32), (1, 300, 40)),
]
CASES = [
    *itertools.product(WKV_SHAPES, WKV),
    # Beside the sizes of chunks; heads of 8, 24, 32, 40 and 64 channels.
    *itertools.product(
        [(1, 1, 8), (1, 2, 16), (2, 15, 24), (1, 16, 32), (2, 17, 24), (1, 33, 80), (1, 70, 128)],
        WKV6,
    ),
    *itertools.product([(2, 15, 10), (2, 15, 41), (3, 15, 64)], SHIFTS),
    *itertools.product([(1, 4, 1), (2, 5, 3), (3, 7, 8), (1, 9, 33), (2, 30, 76)], DEFORMABLE),
    *itertools.product([(), (1,), (3, 37), (17, 59), (1 << 16,)], POINTWISE),
]


@on('shape name', CASES)
def test_results_and_gradients(backend, shape, name):
    for dtype in DTYPES:
        call = OPERATORS[name].make(shape, dtype, backend.device)
        call.check(call.run(backend))


# Steps beyond the grid, groups of uneven size, channels past them.
GRIDS = [((1, 1), 4, 1 / 4), ((5, 4), 10, 1 / 4), ((1, 7), 33, 1 / 8), ((9, 11), 64, 1 / 4)]


@on(
    'shape name grid gamma',
    [((2, math.prod(grid), c), name, grid, gamma) for grid, c, gamma in GRIDS for name in SHIFTS],
)
def test_steps_and_groups_of_shifts(backend, shape, name, grid, gamma):
    for step in (0, 1, 2, 3, 40) if is_quick(backend) else (0, 2, 40):
        options = dict(resolution=grid, shift_pixel=step, channel_gamma=gamma)
        call = OPERATORS[name].make(shape, device=backend.device, **options)
        call.check(call.run(backend))


@on(only=is_quick)
@operators
def test_gradcheck(backend, operator):
    options = dict(resolution=(2, 3)) if 'shift' in operator.name else {}
    shape = (1, 1, 2) if 'deform' in operator.name else (1, 6, 8)  # its maps have many values
    call = operator.make(shape, torch.float64, backend.device, **options)
    inputs = [x.requires_grad_() for x in call.inputs.values()]

    def function(*inputs):
        named = dict(zip(call.inputs, inputs, strict=True))
        return backend.function(operator.name)(**named, **call.options)

    assert torch.autograd.gradcheck(function, inputs)
    if operator.is_linear:
        assert torch.autograd.gradgradcheck(function, inputs)


@on(only=is_quick_kernel)
@operators
def test_second_derivative_says_that_there_is_none(backend, operator):
    call = operator.make(device=backend.device)
    inputs = [x.requires_grad_() for x in call.inputs.values()]
    y = as_list(backend.function(operator.name)(**call.inputs, **call.options))[0]
    (gx,) = torch.autograd.grad(y.square().sum(), inputs[-1], create_graph=True)
    if operator.is_linear:
        gx.sum().backward()
        return
    with pytest.raises(NotImplementedError, match=f'{operator.name} is differentiable once'):
        gx.sum().backward()


@on(only=is_quick)
@operators
def test_gradient_of_one_input_only(backend, operator):
    """The other inputs need none; of several results only the last is used."""
    call = operator.make(device=backend.device)
    call.grads[:-1] = [torch.zeros_like(grad) for grad in call.grads[:-1]]
    call.key = None
    expected = dict(zip(call.names(), call.truth(), strict=True))
    for name in call.inputs:
        inputs = {**call.inputs, name: call.inputs[name].clone().requires_grad_()}
        y = as_list(backend.function(operator.name)(**inputs, **call.options))[-1]
        (got,) = torch.autograd.grad(y, inputs[name], call.grads[-1])
        torch.testing.assert_close(got.double(), expected[f'g{name}'], rtol=1e-4, atol=1e-5)


@operators
def test_pytorch_warns_where_kernels_are_missing(operator, monkeypatch):
    backend = next(x for x in BACKENDS if x.name == 'pytorch')
    monkeypatch.setattr(backends, '_warned', set())
    with backend.serving(), pytest.warns(RuntimeWarning, match='slower pure-PyTorch .* on cpu'):
        operator.make().run(backend)


# --- Layouts ----------------------------------------------------------------------------------


# Elsewhere other vector widths and orders of sums may round otherwise, in the last places.
IS_EXACT = {
    'bi_wkv': lambda backend: backend.name in ('cuda-emulated', 'triton-interpreted'),
    'bi_wkv6': lambda backend: has_kernels(backend) and 'pytorch' not in backend.name,
    'squared_relu': lambda backend: has_kernels(backend) and 'pytorch' not in backend.name,
    'sigmoid_gate': lambda backend: has_kernels(backend) and 'pytorch' not in backend.name,
}


INEXACT = ('gmixes', 'gvalue')


def transposed(x):
    return x.mT.contiguous().mT


def every_second(x):
    return torch.stack([x, torch.full_like(x, math.nan)], dim=-1).flatten(-2)[..., ::2]


def batch_last(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def off_by_one(x):
    """Contiguous, but no address is a multiple of 16 bytes."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@on()
@operators
def test_strides_do_not_matter(backend, operator):
    """Inputs and gradients are read in place, in any layout."""
    is_slow = not is_quick(backend) or (backend.is_loops and 'deform' in operator.name)
    shape = operator.shape if is_slow else (2, 15, 40)
    is_exact = IS_EXACT.get(operator.name, lambda _: True)(backend)
    for dtype in HALF[1:] if is_slow else (*PAIR, torch.float64):
        call = operator.make(shape, dtype, backend.device)
        expected = call.run(backend)
        for layout in (transposed, every_second, batch_last, off_by_one):
            moved = call.map(layout)
            for name in operator.parameters:
                moved.inputs[name] = every_second(call.inputs[name])
            results = moved.run(backend)
            assert results[0].is_contiguous() or backend.is_loops
            for name, got, want in zip(call.names(), results, expected, strict=True):
                if is_exact and name not in INEXACT:
                    assert torch.equal(got, want), (name, dtype, layout)
                else:
                    rtol = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
                    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-5)


@on()
@operators
def test_expanded_inputs(backend, operator):
    """Broadcast inputs, and gradients of ``y.sum().backward()``: strides of 0."""
    call = operator.make((1, *operator.shape[1:]), device=backend.device)
    wide = call.map(lambda x: x.expand(3, *x.shape[1:]))
    for name in operator.parameters:
        if call.inputs[name].dim() > 2:  # it has images
            wide.inputs[name] = call.inputs[name].expand(3, *call.inputs[name].shape[1:])
    wide.grads = [x.new_ones(()).expand_as(x) for x in wide.grads]
    wide.check(wide.run(backend))


@on()
@operators
def test_empty_batch(backend, operator):
    shape = (0, *operator.shape[1:])
    for dtype in DTYPES:
        call = operator.make(shape, dtype, backend.device)
        for name, got in zip(call.names(), call.run(backend), strict=True):
            like = call.inputs[name[1:]] if name[0] == 'g' else call.grads[int(name[1:])]
            assert got.shape == like.shape and got.dtype == like.dtype and not got.any()


# --- Guarantees -------------------------------------------------------------------------------


TYPICAL = [(operator.shape, name, {}) for name, operator in OPERATORS.items()]
LARGE_GRID = ((3, 33 * 40, 24), 'token_shift', dict(resolution=(33, 40)))
LONG = [((1, 4096, 1), 'bi_wkv', {}), ((1, 16384, 3), 'bi_wkv', {}), LARGE_GRID]
SEVERAL_TILES = [
    *(((2, 130, 37), name, {}) for name in WKV),
    ((2, 35, 80), 'bi_wkv6', {}),
    *(((2, 35, 33), name, dict(resolution=(5, 7), shift_pixel=2)) for name in SHIFTS),
]


@contextlib.contextmanager
def deterministic(is_on=True, warn_only=False):
    """Ask for deterministic algorithms; PyTorch then fills new memory with NaN, too."""
    torch.use_deterministic_algorithms(is_on, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def has_atomics(backend, name):
    """Whether sums have a fixed order with deterministic algorithms only, which is another one."""
    return 'deform' in name and ('gpu' in backend.name or 'triton' in backend.name)


@on(
    'shape name options',
    [*TYPICAL, *LONG, *SEVERAL_TILES],
    only=is_quick_kernel,  # an interpreter has no threads
)
def test_same_bits_for_any_number_of_threads(backend, shape, name, options):
    call = OPERATORS[name].make(shape, device=backend.device, **options)
    threads = torch.get_num_threads()
    try:
        with deterministic(has_atomics(backend, name)):
            first = call.run(backend)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same(call.run(backend), first)
    finally:
        torch.set_num_threads(threads)


@on('shape name options', [*TYPICAL, *SEVERAL_TILES], only=has_kernels)
@pytest.mark.parametrize('dtype', PAIR, ids=str)
def test_every_output_element_is_written(backend, shape, name, options, dtype):
    """With fresh memory full of NaN, results stay the same."""
    call = OPERATORS[name].make(shape, dtype, backend.device, **options)
    expected = call.run(backend)
    with deterministic(warn_only=True):  # on a GPU, PyTorch's cumsum is not
        assert torch.empty(3, device=backend.device).isnan().all()
        results = call.run(backend)
    if has_atomics(backend, name):
        torch.testing.assert_close(results, expected)
    else:
        assert same(results, expected)
