"""Functions that benchmarks and analysis tools share: machine facts, timing, peers and tables."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

import vrwkv_ops
from vrwkv_ops.backends import diagnose

DTYPES = {str(x).removeprefix('torch.'): x for x in (torch.float32, torch.float16, torch.bfloat16)}


class ArgumentParser(argparse.ArgumentParser):
    """A parser with the arguments of every benchmark, and ``--peer`` for those of Bi-WKV.

    Args:
        description: Of the benchmark.
        out: Name of the folder for results.
        kernels: Names that no peer may have; without any, the benchmark takes no peers.
    """

    def __init__(self, description: str, out: str, kernels: Collection[str] = ()) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument('--device', type=device, default=default_device(), help='cpu, cuda, ...')
        self.add_argument(
            '--resolutions',
            type=positive_int,
            nargs='+',
            default=[224, 384, 512, 768, 1024, 1536, 2048],
            metavar='PIXELS',
            help='sides of square images (default: 224 to 2048)',
        )
        self.add_argument('--batch-size', type=positive_int, default=1, help='default: 1')
        self.add_argument(
            '--repeats',
            type=positive_int,
            default=5,
            help='timed rounds; the median counts (default: 5)',
        )
        self.add_argument(
            '--out',
            type=Path,
            default=Path('work_dirs') / out,
            help='folder for NAME.json and NAME.png (default: %(default)s)',
        )
        self.kernels = kernels
        if kernels:
            self.add_argument(
                '--peer',
                action='append',
                default=[],
                type=Peer,
                metavar='NAME=FILE.py:FUNCTION',
                help='measure another kernel, FUNCTION(w, u, k, v) -> y like bi_wkv; repeatable',
            )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Parse, and check the names of the peers."""
        parsed = super().parse_args(args, namespace)
        names = [peer.name for peer in getattr(parsed, 'peer', ())]
        if len({*names, *self.kernels}) < len(names) + len(self.kernels):
            self.error(f'--peer needs names that differ from each other and from ours, got {names}')
        return parsed


def default_device() -> torch.device:
    """Return the first GPU, or the CPU of a machine without one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def device(name: str) -> torch.device:
    """Check that a device can be used; for argparse."""
    try:
        result = torch.device(name)
        torch.empty(1, device=result)
    # Every backend has its own errors.
    except Exception as error:
        detail = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f'{name!r} cannot be used: {detail}') from error
    return result


def positive_int(text: str) -> int:
    """Read a number from 1; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number from 1, got {text!r}')
    return int(text)


class Peer:
    """Another implementation of Bi-WKV, from ``NAME=FILE.py:FUNCTION``; for argparse.

    FUNCTION takes ``w, u`` of shape (C,) and ``k, v`` of shape (B, T, C), as
    :func:`vrwkv_ops.bi_wkv` does, and returns ``y`` of the shape of ``k``, differentiable.
    """

    def __init__(self, text: str) -> None:
        name, equals, rest = text.partition('=')
        file, colon, function = rest.rpartition(':')
        if not (name and equals and colon and file.endswith('.py') and function.isidentifier()):
            raise argparse.ArgumentTypeError(f'expected NAME=FILE.py:FUNCTION, got {text!r}')
        path = Path(file).resolve()
        if not path.is_file():
            raise argparse.ArgumentTypeError(f'there is no file {path}')
        spec = importlib.util.spec_from_file_location(f'peer_{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        # The module may raise anything.
        except Exception as error:
            message = f'{path} fails when it is imported: {type(error).__name__}: {error}'
            raise argparse.ArgumentTypeError(message) from error
        if not callable(getattr(module, function, None)):
            raise argparse.ArgumentTypeError(f'{path} has no function {function!r}')
        self.name, self.function = name, getattr(module, function)


# --- Facts ------------------------------------------------------------------------------------


def describe_environment(used: torch.device) -> dict[str, str]:
    """Describe the machine, versions, kernels, commit and command that produced a figure."""
    facts = {
        'device': describe_device(used),
        'processor': f'{_processor()}, {os.cpu_count()} logical cores',
        'threads': str(torch.get_num_threads()),
        'CPU kernels for': torch.backends.cpu.get_cpu_capability(),
        'system': f'{platform.system()} {platform.release()} {platform.machine()}',
        'Python': platform.python_version(),
        'torch': torch.__version__,
        'CUDA of torch': str(torch.version.cuda),
        'vrwkv_ops': vrwkv_ops.__version__,
        'kernels': '; '.join(str(b).splitlines()[0] for b in diagnose()),
        'commit': _output('git', 'describe', '--always', '--dirty') or 'unknown',
        'command': shlex.join(['python', *(_relative(arg) for arg in sys.argv)]),
    }
    if used.type == 'cuda':
        query = ('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
        facts['driver'] = (_output(*query).splitlines() or ['unknown'])[0]
    return facts


def describe_device(used: torch.device) -> str:
    """Return a device's name; a GPU's with its memory and compute capability."""
    if used.type != 'cuda':
        return used.type
    properties = torch.cuda.get_device_properties(used)
    return (
        f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability '
        f'{properties.major}.{properties.minor}'
    )


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ''
    return result.stdout.strip()


def _relative(arg: str) -> str:
    try:
        return str(Path(arg).resolve().relative_to(Path.cwd())) if arg.endswith('.py') else arg
    except ValueError:
        return arg


# --- Timing -----------------------------------------------------------------------------------


def synchronize(used: torch.device) -> None:
    """Wait until a device has finished its work."""
    if used.type != 'cpu':
        torch.get_device_module(used).synchronize(used)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, so that no timing includes page faults.

    Call it only in a benchmark's own process: no later allocation is returned to the system.
    """
    mmap_max, trim_threshold = -4, -1  # glibc's malloc.h
    if platform.libc_ver()[0] == 'glibc':
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def time_calls(
    calls: dict[str, Callable[[], object]], used: torch.device, repeats: int, patience: float
) -> dict[str, float]:
    """Measure the median time of each call in seconds.

    A round measures all calls, so that a change of the machine's load affects all of them. A round
    repeats short calls for 100 ms.

    Args:
        calls: Functions by name. Their arguments must be bound, not loop variables.
        used: Their device.
        repeats: Number of rounds.
        patience: A call that takes more seconds than this is measured once, after its warm-up.

    Returns:
        Seconds by name.
    """
    counts = {}
    for name, call in calls.items():
        call()  # warms up: compiles, fills caches
        once = seconds(call, used)
        counts[name] = max(1, min(1000, int(0.1 / max(once, 1e-6))))
        if once > patience:
            counts[name] = -1
    samples = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if counts[name] > 1:
                call()  # its memory may have left the caches while others ran
            if counts[name] > 0 or not samples[name]:
                samples[name].append(seconds(call, used, abs(counts[name])))
    return {name: statistics.median(times) for name, times in samples.items()}


def seconds(call: Callable[[], object], used: torch.device, count: int = 1) -> float:
    """Measure the mean time of some calls, including the work that they leave to the device."""
    if used.type == 'cuda':
        with torch.cuda.device(used):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    synchronize(used)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(used)
    return (time.perf_counter() - start) / count


def replay(call: Callable[[], object], used: torch.device) -> Callable[[], object]:
    """Return a function that runs the GPU kernels of a call as one CUDA graph, without Python.

    Raises:
        RuntimeError: If the call does what a graph cannot hold, as waiting for the GPU.
    """
    with torch.cuda.device(used):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # warms up on the stream that autograd will use
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
    return graph.replay


def copy_bandwidth(used: torch.device, repeats: int) -> float:
    """Measure the bytes per second that a copy of 256 MiB (64 MiB on a CPU) reads and writes."""
    size = 2**26 if used.type == 'cpu' else 2**28
    source = torch.ones(size // 4, device=used)
    target = torch.empty_like(source)
    seconds = time_calls({'copy': lambda: target.copy_(source)}, used, repeats, 10.0)['copy']
    return 2 * size / seconds


# --- Results ----------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as a Markdown table with aligned columns.

    Args:
        header: Names of the columns.
        rows: Cells, already rounded; None becomes a dash.

    Returns:
        The table: text on the left of its column, numbers on the right.
    """
    cells = [['-' if cell is None else str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(cells) and all(map(_is_number, column[1:])) for column in columns]

    def line(row: Sequence[str]) -> str:
        pad = [str.rjust if number else str.ljust for number in right]
        return f'| {" | ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True))} |'

    rule = [
        '-' * (w - 1) + (':' if number else '-') for w, number in zip(widths, right, strict=True)
    ]
    return '\n'.join([line(header), line(rule), *map(line, cells)])


def _is_number(cell: str) -> bool:
    number = cell.lstrip('+-').rstrip('%').partition(' ')[0].replace('e-', '').replace('.', '', 1)
    return cell in ('', '-') or number.isdigit()


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write results to a file, whose folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n')
