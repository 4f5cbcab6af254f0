"""The CPU kernels of every instruction set that this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

X86 = ['DEFAULT', 'AVX2', 'AVX512']
HERE = torch.backends.cpu.get_cpu_capability()
# Other processors have the portable kernels only.
CAPABILITIES = X86[: X86.index(HERE) + 1] if HERE in X86 else [HERE]

PROGRAM = """
import sys
import torch
from dense_bi_wkv import dense_bi_wkv
from vrwkv_ops import bi_wkv

assert torch.backends.cpu.get_cpu_capability() == sys.argv[1]
torch.manual_seed(0)
for tokens, channels in ((300, 37), (5, 3)):  # chunks, and lanes past the last channel
    inputs = [torch.randn(channels) / 30, torch.randn(channels)]
    inputs += [torch.randn(2, tokens, channels) for _ in range(2)]
    gy = torch.randn(2, tokens, channels)
    results = []
    for function, dtype in ((bi_wkv, torch.float32), (dense_bi_wkv, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, gy.to(dtype))))
    for got, expected in zip(*results, strict=True):
        print(((got - expected).norm() / expected.norm()).item())
"""


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_every_instruction_set(capability):
    """Float32 is right to a few roundings (6e-8 each) with the kernels of each instruction set."""
    process = subprocess.run(
        [sys.executable, '-c', PROGRAM, capability],
        env={**os.environ, 'ATEN_CPU_CAPABILITY': capability.lower(), 'OMP_NUM_THREADS': '1'},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    errors = [float(line) for line in process.stdout.split()]
    assert len(errors) == 10
    assert max(errors) <= 5e-6
