"""Dispatch in C++ is the same as in Python. tests/tools/test_export.py runs it without Python."""

import pytest
import torch
from torch.autograd import forward_ad

from vrwkv_ops import backends, definitions

from .operators import as_list
from .test_torch_library import MODES, make_inputs, schema_calls

COMPILED, PYTHON = 'vrwkv_ops', 'vrwkv_ops_in_python'


@pytest.fixture(autouse=True)
def python_definitions(monkeypatch):
    """Define the operators in Python too, in another namespace, and expect their slow kernels."""
    monkeypatch.setattr(backends, '_warned', {'cpu'})
    if not hasattr(getattr(torch.ops, PYTHON), 'bi_wkv'):
        definitions.complete(PYTHON)


def operators(namespace):
    """Schemas and tags of all operators of a namespace, by name."""
    names = (name.partition('::') for name in torch._C._dispatch_get_all_op_names())
    ops = {name: getattr(torch.ops, n) for n, _, name in names if n == namespace}
    ops = {name: getattr(n, name).default for name, n in ops.items()}
    return {
        name: (str(op._schema).removeprefix(f'{namespace}::'), op.tags) for name, op in ops.items()
    }


def test_schemas_are_the_same():
    assert operators(COMPILED) == operators(PYTHON)
    assert set(operators(PYTHON)) == {op.name for op in definitions.OPERATORS}


def calls():
    """A call of each operator with inputs that need gradients."""
    for name, modes in MODES.items():
        for mode in dict.fromkeys(modes):
            yield from schema_calls(name, make_inputs('cpu'), mode)
    w, u, k, v = make_inputs('cpu')
    yield torch.ops.vrwkv_ops.bi_wkv, (w, u, k, v, True)
    yield torch.ops.vrwkv_ops.token_shift, (k, [w, u[None, None]], 2, 3, 1, 0.25, 'q_shift')


CALLS = [(op.__name__.rpartition('.')[2], args) for op, args in calls()]


def tensors(args):
    """Tensors among arguments and in their lists."""
    flat = (x for arg in args for x in (arg if isinstance(arg, list) else [arg]))
    return [x for x in flat if isinstance(x, torch.Tensor)]


def with_grad(args):
    """Arguments that are leaves and need gradients, if a gradient can be asked for."""
    return [
        x.detach().clone().requires_grad_()
        if isinstance(x, torch.Tensor) and x.numel()
        else [y.detach().clone().requires_grad_() for y in x]
        if isinstance(x, list)
        else x
        for x in args
    ]


def message(function):
    """The type and text of the error that a function raises."""
    with pytest.raises((RuntimeError, NotImplementedError)) as error:
        function()
    return type(error.value), str(error.value).partition('\n')[0]


@pytest.mark.parametrize(('name', 'args'), CALLS)
def test_autograd_is_the_same(name, args):
    """Results, which of them need gradients, the gradients, and the error of a second derivative.

    The kernels differ: float32 sums in another order.
    """
    outcomes = []
    for namespace in (COMPILED, PYTHON):
        op, leaves = getattr(getattr(torch.ops, namespace), name), with_grad(args)
        with torch.no_grad():
            plain = as_list(op(*leaves))
        results = as_list(op(*leaves))
        for a, b in zip(plain, results, strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b.detach())
        needed = [y.requires_grad for y in results]
        # Of small arguments: the sine of a large one magnifies the rounding of the results.
        total = sum((y / 8).sin().sum() for y in results if y.requires_grad)
        wanted = [x for x in tensors(leaves) if x.requires_grad]
        if name.endswith('_backward') or (args[-1] is False and name == 'bi_wkv_forward'):
            gradients, error = [], message(total.backward)
        else:
            gradients = torch.autograd.grad(total, wanted, create_graph=name != 'q_shift')
            error = None
            if name != 'q_shift':
                error = message(sum(x.sum() for x in gradients).backward)
        outcomes.append((results, needed, gradients, error))
    (y, needed, grads, error), (other_y, *other, other_grads, other_error) = outcomes
    assert [needed] == other and error == other_error
    torch.testing.assert_close(y, other_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(grads), list(other_grads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'args'), CALLS)
def test_autocast_is_the_same(name, args):
    """Dtypes of results and gradients. Autocast does not change what a backward pass computes."""
    outcomes = []
    for namespace in (COMPILED, PYTHON):
        op = getattr(getattr(torch.ops, namespace), name)
        dtypes = []
        if name.endswith('_backward'):
            with torch.autocast('cpu', torch.bfloat16):
                results = as_list(op(*args))
            torch.testing.assert_close(results, as_list(op(*args)), rtol=0, atol=0)
        else:
            for dtype in (torch.float32, torch.float64):
                leaves = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
                leaves = with_grad(leaves)
                with torch.autocast('cpu', torch.bfloat16):
                    results = as_list(op(*leaves))
                dtypes += [(y.dtype, y.shape) for y in results]
                if name != 'bi_wkv_forward' or args[-1]:
                    sum(y.sum() for y in results if y.requires_grad).backward()
                    dtypes += [x.grad.dtype for x in tensors(leaves)]
        outcomes.append(dtypes)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(('name', 'args'), CALLS)
def test_forward_mode_is_refused(name, args):
    """Its tangents are not lost in silence, also where no gradient is needed."""
    with torch.no_grad(), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.detach(), torch.ones_like(x))
            if isinstance(x, torch.Tensor)
            else x
            for x in args
        ]
        with pytest.raises(RuntimeError, match='jvp is not implemented'):
            getattr(torch.ops.vrwkv_ops, name)(*duals)
