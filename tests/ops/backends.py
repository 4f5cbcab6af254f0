"""The backends that the operators' tests run on.

A backend serves the operators' schemas with its kernels, so that a test calls the public functions
and gets the argument checks, autograd and kernels that a user of this backend gets.
"""

import atexit
import contextlib
import functools
import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

import vrwkv_ops
from vrwkv_ops import ops, reference
from vrwkv_ops import triton as triton_backend

# The start of a program that shall find no compiled kernels.
HIDE_KERNELS = """
import pathlib
read_text = pathlib.Path.read_text
def hidden(self, *args, **kwargs):
    if self.name == '_build_info.json':
        raise FileNotFoundError
    return read_text(self, *args, **kwargs)
pathlib.Path.read_text = hidden
"""


@dataclass(frozen=True)
class Backend:
    """An implementation of the operators.

    Attributes:
        name: Its name in the tests' ids.
        device: Device of the tensors that it takes.
        kernels: Returns a kernel for each schema; without it, the installed kernels run.
        is_loops: Whether it is vrwkv_ops.reference: plain functions, differentiated by autograd.
        most_tokens: The longest sequence that it gets, by its speed.
        most_elements: The largest tensor that it gets.
    """

    name: str
    device: str = 'cpu'
    kernels: Callable[[], Mapping[str, Callable]] | None = None
    is_loops: bool = False
    most_tokens: int = 1 << 20
    most_elements: int = 1 << 30

    def can_take(self, name: str, size: int | tuple[int, ...]) -> bool:
        """Whether a case is small enough, by its ``tokens`` or ``shape``."""
        if name == 'tokens':
            return size <= self.most_tokens
        if name == 'shape':
            is_long = len(size) == 3 and size[1] > self.most_tokens
            return not is_long and math.prod(size) <= self.most_elements
        return True

    def function(self, name: str) -> Callable:
        """The public function of an operator, or the loops."""
        return (
            getattr(reference, f'{name}_reference') if self.is_loops else getattr(vrwkv_ops, name)
        )

    @contextlib.contextmanager
    def serving(self) -> Iterator['Backend']:
        """Has the kernels serve the operators."""
        if self.kernels is None:
            yield self
            return
        library = torch.library.Library('vrwkv_ops', 'IMPL')
        try:
            for name, kernel in self.kernels().items():
                library.impl(name, kernel, self.device.upper())
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', 'vrwkv_ops: running the slower pure-PyTorch')
                yield self
        finally:
            library._destroy()


def _emulated() -> dict[str, Callable]:
    from .emulated_cuda import load

    return {name: getattr(load(), name) for name in ops.SCAN_KERNELS if hasattr(load(), name)}


class Interpreter:
    """A process with Triton's interpreter, whose switch must be set before Triton is imported.

    See interpreted_triton.py, which is its program.
    """

    def __init__(self) -> None:
        self._connection, other = Pipe()
        self._process = subprocess.Popen(
            [
                sys.executable,
                Path(__file__).with_name('interpreted_triton.py'),
                str(other.fileno()),
            ],
            env={**os.environ, 'TRITON_INTERPRET': '1'},
            pass_fds=[other.fileno()],
        )
        other.close()
        atexit.register(self._connection.close)  # ends the process

    def call(self, name: str, *args: object) -> object:
        """Calls a kernel, or another function that the program offers."""
        request = io.BytesIO()
        torch.save((name, args, torch.are_deterministic_algorithms_enabled()), request)
        self._connection.send_bytes(request.getvalue())
        kind, result = torch.load(io.BytesIO(self._connection.recv_bytes()), weights_only=True)
        if kind != 'result':
            raise {'ValueError': ValueError, 'TypeError': TypeError}.get(kind, RuntimeError)(result)
        return result


@functools.cache
def interpreter() -> Interpreter:
    """The interpreter's process, started at the first call."""
    return Interpreter()


def _interpreted() -> dict[str, Callable]:
    return {name: functools.partial(interpreter().call, name) for name in ops.SCAN_KERNELS}


BACKENDS = [
    Backend('reference', is_loops=True, most_tokens=200),
    Backend('pytorch', kernels=lambda: ops.SCAN_KERNELS),
    Backend('cpu'),
    Backend('cuda-emulated', kernels=_emulated, most_tokens=1100),
    Backend('triton-interpreted', kernels=_interpreted, most_tokens=33, most_elements=470),
    Backend('pytorch-gpu', 'cuda', kernels=lambda: ops.SCAN_KERNELS),
    Backend('cuda-gpu', 'cuda'),
    Backend('triton-gpu', 'cuda', kernels=lambda: triton_backend._operators()),
]


def on(
    names: str = '', cases: Iterable = ((),), *, only: Callable[[Backend], bool] = lambda _: True
) -> pytest.MarkDecorator:
    """Parametrises a test by ``backend`` and its cases.

    Args:
        names: Further parameters. If the first is ``tokens`` or ``shape`` (B, T, C), backends for
            which the case is too large are left out.
        cases: Their values, or a dictionary of values by id.
        only: Which backends take part.
    """
    names = names.replace(',', ' ').split()
    ids = {}
    if isinstance(cases, dict):
        ids, cases = dict(enumerate(cases)), cases.values()
    cases = [case if isinstance(case, tuple) and len(names) > 1 else (case,) for case in cases]
    cases = cases if names else [()]
    parameters = []
    for backend in filter(only, BACKENDS):
        marks = [pytest.mark.cuda] if backend.device == 'cuda' else []
        for index, case in enumerate(cases):
            if names and not backend.can_take(names[0], case[0]):
                continue
            values = ids.get(index) or '-'.join(filter(None, map(_id, case)))
            name = f'{backend.name}-{values}' if values else backend.name
            parameters.append(pytest.param(backend, *case, id=name, marks=marks))
    return pytest.mark.parametrize(('backend', *names), parameters, indirect=['backend'])


def _id(value: object) -> str:
    if isinstance(value, tuple):
        return 'x'.join(map(str, value))
    if isinstance(value, dict):
        return ''
    return str(getattr(value, '__name__', value)).removeprefix('torch.')


def has_kernels(backend: Backend) -> bool:
    """Whether a backend has kernels: what a kernel promises does not hold for loops."""
    return not backend.is_loops


def is_quick(backend: Backend) -> bool:
    """Whether a backend may be called hundreds of times."""
    return 'interpreted' not in backend.name


def is_quick_kernel(backend: Backend) -> bool:
    """Whether a backend has kernels and may be called hundreds of times."""
    return has_kernels(backend) and is_quick(backend)
