"""The CPU kernels of the smaller instruction sets. test_operators.py runs those of this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

X86 = ['DEFAULT', 'AVX2', 'AVX512']
HERE = torch.backends.cpu.get_cpu_capability()
# Other processors have the portable kernels only.
OTHERS = X86[: X86.index(HERE)] if HERE in X86 else []

PROGRAM = """
import math
import sys

import torch

from ops.backends import BACKENDS
from ops.operators import OPERATORS
from ops.test_operators import CASES, PAIR

assert torch.backends.cpu.get_cpu_capability() == sys.argv[1]
cpu = next(backend for backend in BACKENDS if backend.name == 'cpu')
for shape, name in CASES:
    if math.prod(shape) <= 5000:
        for dtype in PAIR:
            call = OPERATORS[name].make(shape, dtype)
            call.check(call.run(cpu))
"""


@pytest.mark.parametrize('capability', OTHERS)
def test_every_instruction_set(capability):
    """Every operator, forward and backward, held to the bars of operators.py."""
    process = subprocess.run(
        [sys.executable, '-c', PROGRAM, capability],
        env={**os.environ, 'ATEN_CPU_CAPABILITY': capability.lower(), 'OMP_NUM_THREADS': '1'},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
