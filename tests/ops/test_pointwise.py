"""What only the element-wise operators have: saturated gates, mixed dtypes, fusing compilers."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vrwkv_ops
from vrwkv_ops import pointwise

from .backends import has_kernels, on
from .operators import HALF, OPERATORS


@on(only=has_kernels)
def test_extremes(backend):
    """Saturated gates, and no NaN but where one went in."""
    gate, squared = map(backend.function, ('sigmoid_gate', 'squared_relu'))
    far = [-math.inf, -1e4, -100.0, 100.0, 1e4, math.inf, math.nan]
    r = torch.tensor(far, device=backend.device)
    y = gate(r, torch.ones_like(r)).cpu()
    torch.testing.assert_close(y[:6], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    assert y[6].isnan() and squared(r)[6].isnan()
    r = r[:6].requires_grad_()
    gate(r, torch.ones_like(r)).sum().backward()
    torch.testing.assert_close(r.grad.cpu(), torch.zeros(6))
    r = torch.tensor([-600.0, -90.0, 30.0], dtype=torch.float64, device=backend.device)
    y = gate(r, torch.ones_like(r))
    torch.testing.assert_close(y, torch.sigmoid(r), rtol=1e-14, atol=0)


@on(only=has_kernels)
@pytest.mark.parametrize('dtype', HALF, ids=str)
def test_every_number_of_a_half_type(backend, dtype):
    """The square is rounded as by PyTorch: ties, subnormal numbers, overflow and NaN, too."""
    x = torch.arange(-(2**15), 2**15, device=backend.device).to(torch.int16).view(dtype)
    expected = torch.where(x < 0, 0, x.float().square()).to(dtype)
    found = backend.function('squared_relu')(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@on()
def test_gate_of_mixed_dtypes(backend):
    """As under autocast, where a layer norm makes float32 of what it normalises."""
    r, x = torch.randn(2, 40, device=backend.device)
    y = backend.function('sigmoid_gate')(r.bfloat16(), x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.sigmoid(r.bfloat16().float()) * x)


@pytest.mark.parametrize('name', ['squared_relu', 'sigmoid_gate'])
def test_autocast_on_a_gpu_keeps_the_dtype(name):
    """PyTorch's autocast computes some functions in float32, such as pow."""
    torch.set_autocast_enabled('cuda', True)  # torch.autocast would want a GPU
    try:
        with FakeTensorMode():
            x = torch.empty(3, 37, dtype=torch.bfloat16, device='cuda')
            assert x.square().dtype == torch.float32
            inputs = [x] * len(OPERATORS[name].make((3, 37)).inputs)
            assert getattr(pointwise, name)(*inputs).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled('cuda', False)


@pytest.mark.parametrize('name', ['squared_relu', 'sigmoid_gate'])
def test_compilers_fuse_it_themselves(name):
    """While torch compiles, no operator of ours stands in the way of its fusion."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    inputs = OPERATORS[name].make((3, 37)).inputs.values()
    compiled = torch.compile(getattr(vrwkv_ops, name), fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(*inputs), getattr(vrwkv_ops, name)(*inputs))
    assert 'vrwkv_ops' not in str([node.target for node in graphs[0].graph.nodes])
