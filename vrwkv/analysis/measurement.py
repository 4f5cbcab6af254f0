"""Time and memory of models."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar('Result')


def memory_in_use(device: str | torch.device) -> int:
    """Return the bytes in use: allocated by PyTorch on a GPU, resident on a CPU (Linux only)."""
    device = torch.device(device)
    return torch.cuda.memory_allocated(device) if device.type == 'cuda' else _status('VmRSS')


def peak_memory(device: str | torch.device) -> int:
    """Return the largest number of bytes in use so far, counted like :func:`memory_in_use`.

    It never falls, so measure each model in its own process (:func:`run_in_new_process`).
    """
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status('VmHWM')
    except OSError:  # not Linux; this peak may include the parent process
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else 1024 * peak


def _status(name: str) -> int:
    """Read an entry of Linux's process status, given in kB, as bytes."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{name}:'):
            return 1024 * int(line.split()[1])
    raise OSError(f'/proc/self/status has no {name}')


def run_in_new_process(function: Callable[..., Result], *args: object) -> Result:
    """Call a function in a new process, which starts with a peak of memory of its own.

    Args:
        function: A function of a module, so that the process can import it.
        *args: Its arguments.

    Returns:
        Its result.
    """
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(function, *args).result()
