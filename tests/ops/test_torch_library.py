"""What torch.library promises: opcheck, torch.compile, torch.export, autocast, memory."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from vrwkv_ops import bi_wkv, q_shift

from .backends import is_quick, is_quick_kernel, on
from .operators import DTYPES

devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
dtypes = pytest.mark.parametrize('dtype', DTYPES, ids=str)
ops = torch.ops.vrwkv_ops


def make_inputs(device, dtype=torch.float32, shape=(2, 6, 8), grad=True):
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    w, u = (torch.randn(shape[-1], dtype=accumulation, generator=generator) for _ in range(2))
    k, v = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    return [x.to(device).requires_grad_(grad) for x in (w, u, k, v)]


def schema_calls(name, inputs, mode):
    """Calls of an operator's schemas, forward and backward."""
    detached = [x.detach() for x in inputs]
    w, u, k, v = detached
    if name == 'bi_wkv':
        saved = ops.bi_wkv_forward(*detached, mode, True)
        yield ops.bi_wkv_forward, (*inputs, mode, True)
        yield ops.bi_wkv_forward, (*detached, mode, False)
        yield ops.bi_wkv_backward, (torch.randn_like(k), *detached, *saved, mode)
    elif name == 'bi_wkv6':
        six = [x.detach().repeat(1, 1, 2) for x in (v, k, v, k.to(w))] + [torch.stack([w, u])]
        yield ops.bi_wkv6_forward, ([x.clone().requires_grad_() for x in six] + [mode])
        yield ops.bi_wkv6_backward, ([six[1], *six, mode])
    elif name == 'q_shift':
        yield ops.q_shift, (inputs[2], 2, 3, 1, 0.25, mode, 1 + mode)
    elif name == 'token_shift':
        mixes = torch.stack([w, u])
        grid = (2, 3, 1, 0.25, mode, 2) if mode == 'q_shift' else (1, 6, 1, 0.25, mode)
        yield ops.token_shift_forward, (inputs[2], mixes.clone().requires_grad_(), *grid)
        yield ops.token_shift_backward, ([k, v], k, mixes, *grid)
    elif name == 'ms_deform_attn':
        value = inputs[2].detach()[:, :, None].requires_grad_()  # (B, 6, 1, C)
        generator = torch.Generator().manual_seed(0)
        points = [torch.rand(k.shape[0], 3, 1, 2, 2, *n, generator=generator) for n in ((2,), ())]
        points = [x.to(k).requires_grad_() for x in points]
        shapes = (2, 2, *mode)
        yield ops.ms_deform_attn, (value, shapes, *points)
        grad = torch.randn_like(k[:, :3])
        detached = [x.detach() for x in (value, *points)]
        yield ops.ms_deform_attn_backward, (grad, detached[0], shapes, *detached[1:])
    else:
        yield ops.squared_relu, (inputs[3],)
        yield ops.squared_relu_backward, (k, v)
        yield ops.sigmoid_gate, (inputs[2], inputs[3])
        yield ops.sigmoid_gate_backward, (k, k, v)


# Modes for the four dtypes: shapes and dtypes of results depend on one of the two at a time.
MODES = {
    'bi_wkv': (False, True, False, True),
    'bi_wkv6': (False, True, False, True),
    'q_shift': (False, True, True, False),
    'token_shift': ('q_shift', 'double_shift', 'double_shift', 'single_shift'),
    'ms_deform_attn': ((1, 2),) * 4,
    'pointwise': (None,) * 4,
}


def is_compiled(backend):
    return is_quick_kernel(backend) and backend.name != 'pytorch'


@on(only=is_compiled)
@pytest.mark.parametrize('name', MODES)
@pytest.mark.parametrize('index', range(4), ids=map(str, DTYPES))
def test_opcheck(backend, name, index):
    inputs = make_inputs(backend.device, DTYPES[index])
    for schema, args in schema_calls(name, inputs, MODES[name][index]):
        opcheck(schema.default, args)


@on(only=lambda backend: not is_quick(backend))
@pytest.mark.parametrize('name', [name for name in MODES if name != 'bi_wkv6'])
def test_opcheck_in_the_interpreter(backend, name):
    inputs = make_inputs(backend.device, torch.bfloat16, (1, 6, 4))
    for schema, args in schema_calls(name, inputs, MODES[name][0]):
        opcheck(schema.default, args)


@devices
@dtypes
def test_what_is_saved(device, dtype):
    """z is the log of the denominator; y and its residual together are exact to 16 bits."""
    w, u, k, v = make_inputs(device, dtype, (1, 2, 3), grad=False)
    y, residual, z = ops.bi_wkv_forward(w, u, k, v, False, True)
    k64, v64 = k.double(), v.double()
    logits = torch.stack([k64 + u, k64.flip(1)])  # with two tokens, n = 0 for the other one
    expected_z = logits.logsumexp(0)
    expected_y = (logits.softmax(0) * torch.stack([v64, v64.flip(1)])).sum(0)
    torch.testing.assert_close(z.double(), expected_z, rtol=1e-6, atol=1e-6)
    half = dtype in (torch.float16, torch.bfloat16)
    assert residual.shape == (y.shape if half else (0,)) and residual.dtype == y.dtype == dtype
    total = y.double() + residual.double() if half else y.double()
    torch.testing.assert_close(total, expected_y, rtol=1e-5, atol=3e-5 if half else 1e-6)
    _, residual, z = ops.bi_wkv_forward(w, u, k, v, False, False)
    assert residual.shape == z.shape == (0,)


def _block(w, u, k, v, resolution, causal):
    return bi_wkv(w, u, q_shift(k, resolution), v, causal) * 2


@devices
@pytest.mark.parametrize('dynamic', [False, True], ids=['static', 'dynamic'])
def test_compile_without_graph_breaks(device, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(_block, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for height, width in ((2, 3), (4, 5), (7, 3)) if dynamic else ((2, 3),):
        inputs = make_inputs(device, shape=(2, height * width, 8))
        results = []
        for function in (_block, compiled):
            y = function(*inputs, (height, width), False)
            results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1  # the first graph served all sizes


@devices
def test_compile_with_inductor(device):
    torch._dynamo.reset()
    inputs = make_inputs(device)
    y = torch.compile(_block, fullgraph=True)(*inputs, (2, 3), True)
    torch.testing.assert_close(y, _block(*inputs, (2, 3), True))


def test_wrong_calls_under_compile():
    torch._dynamo.reset()
    w, u, k, v = make_inputs('cpu', grad=False)
    with pytest.raises(Exception, match='must have shape'):
        torch.compile(bi_wkv, fullgraph=True, backend='eager')(w[:3], u, k, v)


class _Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u = (torch.nn.Parameter(torch.randn(8)) for _ in range(2))

    def forward(self, image):
        _, _, height, width = image.shape
        x = image.flatten(2).transpose(1, 2)
        return bi_wkv(self.w, self.u, q_shift(x, (height, width)), x)


@pytest.mark.parametrize('strict', [False, True])
def test_export_with_dynamic_height_and_width(strict):
    module = _Block()
    sizes = {
        2: torch.export.Dim('height', min=2, max=64),
        3: torch.export.Dim('width', min=2, max=64),
    }
    program = torch.export.export(
        module, (torch.randn(1, 8, 4, 6),), dynamic_shapes=(sizes,), strict=strict
    )
    image = torch.randn(1, 8, 9, 5)
    torch.testing.assert_close(program.module()(image), module(image))


@devices
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    """k and v take autocast's dtype, w and u stay float32; gradients have the inputs' dtypes."""
    torch._dynamo.reset()
    w, u, k, v = make_inputs(device)
    with torch.autocast(device, dtype):
        y = bi_wkv(w, u, k, v)
        compiled = torch.compile(bi_wkv, fullgraph=True, backend='aot_eager')(w, u, k, v)
        mixed = bi_wkv(w, u, k.to(dtype), v)
        shifted = q_shift(k, (2, 3))
    assert y.dtype == dtype and shifted.dtype == torch.float32
    expected = bi_wkv(w, u, k.to(dtype), v.to(dtype))
    assert torch.equal(y, expected)
    assert torch.equal(compiled, expected)
    assert torch.equal(mixed, expected)
    gradients = torch.autograd.grad(y.float().sum(), (w, u, k, v))
    assert all(g.dtype == torch.float32 for g in gradients)


@devices
def test_autocast_leaves_float64_alone(device):
    inputs = make_inputs(device, torch.float64)
    with torch.autocast(device, torch.bfloat16):
        assert bi_wkv(*inputs).dtype == torch.float64
        with pytest.raises(TypeError, match="'k' and 'v'"):
            bi_wkv(*inputs[:3], inputs[3].float())


@devices
def test_parameters_of_other_dtype(device):
    """w and u are converted to the accumulation dtype, their gradients back."""
    w, u, k, v = make_inputs(device, torch.bfloat16)
    w64, u16 = w.detach().double().requires_grad_(), u.detach().half().requires_grad_()
    y = bi_wkv(w64, u16, k, v)
    gw, gu = torch.autograd.grad(y.sum(), (w64, u16))
    assert (y.dtype, gw.dtype, gu.dtype) == (torch.bfloat16, torch.float64, torch.float16)


def test_meta_tensors():
    y = bi_wkv(*make_inputs('meta', grad=False))
    assert y.device.type == 'meta' and y.shape == (2, 6, 8)


def allocations(function):
    """Sizes in bytes of what the CPU allocator hands out while ``function`` runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    return result, sorted(e.nbytes() for e in events if e.name() == '[memory]' and e.nbytes() > 0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_as_large_as_an_input_is_allocated(dtype):
    """But for the outputs: half inputs are not converted as a whole, strided ones not copied."""
    w, u, k, v = make_inputs('cpu', dtype, (2, 64, 4096), grad=False)
    k, v, gy = (x.transpose(1, 2) for x in (k, v, torch.randn_like(v)))  # (2, 4096, 64)
    w, u = w[:64], u[:64]
    nbytes = k.numel() * k.element_size()
    half = dtype != torch.float32

    saved, sizes = allocations(lambda: ops.bi_wkv_forward(w, u, k, v, False, False))
    assert [size for size in sizes if size >= nbytes] == [nbytes]
    saved, sizes = allocations(lambda: ops.bi_wkv_forward(w, u, k, v, False, True))
    expected = sorted([nbytes, k.numel() * 4] + [nbytes] * half)  # y, z and the residual
    assert [size for size in sizes if size >= nbytes] == expected
    _, sizes = allocations(lambda: ops.bi_wkv_backward(gy, w, u, k, v, *saved, False))
    assert [size for size in sizes if size >= nbytes] == [nbytes] * 2  # gk, gv
    _, sizes = allocations(lambda: ops.q_shift(k, 64, 64, 1, 0.25, False))
    assert [size for size in sizes if size >= nbytes] == [nbytes]
    shift = (torch.stack([w, u]), 64, 64, 1, 0.25, 'q_shift')
    _, sizes = allocations(lambda: ops.token_shift_forward(k, *shift))
    assert [size for size in sizes if size >= nbytes] == [nbytes] * 2
    _, sizes = allocations(lambda: ops.token_shift_backward([k, v], k, *shift))
    assert [size for size in sizes if size >= nbytes] == [nbytes]
