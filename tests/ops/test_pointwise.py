"""Element-wise operators: every backend against float64, their gradients and wrong calls."""

import math

import pytest
import torch

from vrwkv_ops import pointwise, sigmoid_gate, squared_relu
from vrwkv_ops.reference import sigmoid_gate_reference, squared_relu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FUNCTIONS = {
    'squared_relu': (squared_relu, squared_relu_reference),
    'sigmoid_gate': (sigmoid_gate, sigmoid_gate_reference),
}
functions = pytest.mark.parametrize('name', FUNCTIONS)
devices = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])


def truth(name, *inputs):
    """Written out in float64, with the gradients of an output gradient, the last input."""
    *inputs, grad = (x.double() for x in inputs)
    if name == 'squared_relu':
        (x,) = inputs
        return x * x * (x > 0), grad * 2 * x * (x > 0)
    r, x = inputs
    gate = 1 / (1 + torch.exp(-r))
    return gate * x, grad * x * torch.exp(-r) * gate * gate, grad * gate


def make_inputs(name, shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    count = 2 if name == 'squared_relu' else 3
    inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    inputs[0] *= 4
    return [x.to(device, dtype) for x in inputs]


def run(function, *inputs):
    *inputs, grad = inputs
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def run_in_pytorch(name, *inputs):
    """The pure-PyTorch kernels, called past the dispatcher."""
    *inputs, grad = inputs
    y = getattr(pointwise, name)(*inputs)
    gradients = getattr(pointwise, f'{name}_backward')(grad, *inputs)
    return (y, *(gradients if isinstance(gradients, tuple) else (gradients,)))


@functions
@devices
@pytest.mark.parametrize('version', [0, 1, None], ids=['kernel', 'reference', 'pytorch'])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(), (1,), (3, 37), (2, 64, 17), (1 << 16,)])
def test_values_and_gradients(name, version, device, dtype, shape):
    """Rounded once, on top of a few roundings of the accumulation dtype."""
    inputs = make_inputs(name, shape, dtype, device)
    if version is None:
        results = run_in_pytorch(name, *inputs)
    else:
        results = run(FUNCTIONS[name][version], *inputs)
    for got, expected in zip(results, truth(name, *inputs), strict=True):
        assert got.dtype == dtype and got.shape == shape
        rounding = (expected.to(dtype).double() - expected).norm()
        bar = 1e-14 if dtype == torch.float64 else 5e-7
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * expected.norm()


@functions
@devices
def test_any_strides_and_no_elements(name, device):
    inputs = make_inputs(name, (4, 6, 10), torch.float32, device)
    expected = run(FUNCTIONS[name][0], *inputs)
    results = run(FUNCTIONS[name][0], *(x.mT.contiguous().mT for x in inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    unaligned = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) for x in inputs]
    results = run(FUNCTIONS[name][0], *unaligned)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(x.shape == (0, 6, 10) for x in run(FUNCTIONS[name][0], *(x[:0] for x in inputs)))


@functions
@devices
def test_gradcheck(name, device):
    *inputs, _ = make_inputs(name, (3, 4), torch.float64, device)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(FUNCTIONS[name][0], inputs)
    y = FUNCTIONS[name][0](*inputs)
    (gx,) = torch.autograd.grad(y.sum(), inputs[-1], create_graph=True)
    with pytest.raises(NotImplementedError, match=f'{name} is differentiable once'):
        gx.sum().backward()


@devices
def test_extremes(device):
    """Saturated gates, and no NaN but where one went in."""
    r = torch.tensor([-math.inf, -1e4, -100.0, 100.0, 1e4, math.inf, math.nan], device=device)
    y = sigmoid_gate(r, torch.ones_like(r)).cpu()
    torch.testing.assert_close(y[:6], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    assert y[6].isnan() and squared_relu(r)[6].isnan()
    r = r[:6].requires_grad_()
    sigmoid_gate(r, torch.ones_like(r)).sum().backward()
    torch.testing.assert_close(r.grad.cpu(), torch.zeros(6))


@devices
def test_gate_of_mixed_dtypes(device):
    """As under autocast, where a layer norm makes float32 of what it normalises."""
    r, x = torch.randn(2, 40, device=device)
    y = sigmoid_gate(r.bfloat16(), x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.sigmoid(r.bfloat16().float()) * x)


@functions
def test_compilers_fuse_it_themselves(name):
    """While torch compiles, no operator of ours stands in the way of its fusion."""
    torch._dynamo.reset()
    inputs = make_inputs(name, (3, 37), torch.float32, 'cpu')
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(FUNCTIONS[name][0], fullgraph=True, backend=keep)
    torch.testing.assert_close(run(compiled, *inputs), run(FUNCTIONS[name][0], *inputs))
    assert 'vrwkv_ops' not in str([node.target for node in graphs[0].graph.nodes])
