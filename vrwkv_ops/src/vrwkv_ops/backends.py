"""Loads the compiled kernels and explains which backends are there, which are not, and why."""

import importlib.metadata
import importlib.util
import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent
_BUILD_INFO = _PACKAGE / '_build_info.json'
_REINSTALL = (
    'Reinstall it into this environment: pip install --force-reinstall --no-deps '
    '--no-build-isolation <path to vrwkv_ops>'
)
_TITLES = {'cpu': 'C++ kernels for the CPU', 'cuda': 'CUDA kernels'}
_TRITON = 'Triton kernels'


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: What it is.
        available: Whether it can be used now.
        why: What it was built for, or why it is not available.
        fix: What to do about it; empty if available.
        archs: GPU architectures that it was compiled for.
    """

    name: str
    available: bool
    why: str
    fix: str = ''
    archs: str = ''

    def __str__(self) -> str:
        """Formats as one or two lines."""
        line = f'[{"x" if self.available else " "}] {self.name}: {self.why}'
        return f'{line}\n      {self.fix}' if self.fix else line


_loaded: dict[str, Backend] = {}
_warned: set[str] = set()


def load() -> None:
    """Loads what was compiled; called once, after the operators are defined."""
    try:
        info = json.loads(_BUILD_INFO.read_text())
    except FileNotFoundError:
        info = None
    for device_type in _TITLES:
        _loaded[device_type] = _load_part(device_type, info)
    _loaded['triton'] = _find_triton()


def triton_serves_gpus() -> bool:
    """Whether Triton is to stand in for CUDA kernels that are not there."""
    return _loaded['triton'].available and not _loaded['cuda'].available


def triton_failed(why: str) -> None:
    """Records that Triton does not work on a GPU here: the scan serves it, and says so."""
    fix = 'Compile the CUDA kernels: pip install --force-reinstall --no-deps <path to vrwkv_ops>'
    _loaded['triton'] = Backend(_TRITON, False, f'they do not work here ({why})', fix)


def _find_triton() -> Backend:
    """Whether Triton is installed, without importing it."""
    if importlib.util.find_spec('triton') is None:
        fix = "Install it ('pip install triton'), or a build of torch that brings it"
        return Backend(_TRITON, False, 'Triton is not installed', fix)
    try:
        version = importlib.metadata.version('triton')
    except importlib.metadata.PackageNotFoundError:  # e.g. pytorch-triton, of a nightly torch
        version = 'of a name of its own'
    return Backend(_TRITON, True, f'Triton {version}')


def _load_part(device_type: str, info: dict | None) -> Backend:
    title = _TITLES[device_type]
    if info is None:
        return Backend(title, False, 'this copy of vrwkv_ops was never built', _REINSTALL)
    part = info[device_type]
    if not part['built']:
        return Backend(title, False, part['why'], part['fix'])

    built_for = f'torch {info["torch"]}'
    problem = ''
    if _abi(info['torch'], info['torch_cuda']) != _abi(torch.__version__, torch.version.cuda):
        problem = f'compiled for {built_for}, but this is torch {torch.__version__}'
    else:
        try:
            torch.ops.load_library(_PACKAGE / part['file'])
        except OSError as error:
            problem = f'{part["file"]}, compiled for {built_for}, does not load: {error}'
    if problem:
        warnings.warn(
            f'vrwkv_ops: {title} are not used: {problem}. {_REINSTALL}',
            RuntimeWarning,
            stacklevel=2,
        )
        _warned.add(device_type)
        return Backend(title, False, problem, _REINSTALL)
    archs = f', GPU architectures {part["archs"]}' if part['archs'] else ''
    return Backend(title, True, f'compiled for {built_for}{archs}', archs=part['archs'])


def _abi(torch_version: str, cuda_version: str | None) -> tuple:
    """What must agree between building and running: torch's minor version and CUDA's major one."""
    release = torch_version.split('+')[0].split('.')[:2]
    return (*release, cuda_version and cuda_version.split('.')[0])


def warn_if_slow(device: torch.device) -> None:
    """Warns, once per kind of device, that the pure-PyTorch scan stands in for compiled kernels."""
    backend = _loaded.get(device.type)
    if backend is None or device.type in _warned:
        return
    _warned.add(device.type)
    triton = ''
    if device.type == 'cuda' and 'triton' in _loaded and not _loaded['triton'].available:
        triton = f'As for {_TRITON}, {_loaded["triton"].why}. '
    warnings.warn(
        f'vrwkv_ops: running the slower pure-PyTorch implementation on {device.type}, because the '
        f'{backend.name} are not available: {backend.why}. {backend.fix}. {triton}'
        "'python -m vrwkv_ops' shows all backends",
        RuntimeWarning,
        stacklevel=2,
    )


def diagnose() -> list[Backend]:
    """States of all backends, the fastest first."""
    return [
        _check_gpu(_loaded['cuda']),
        _check_triton(_loaded['triton']),
        _loaded['cpu'],
        Backend('pure-PyTorch scan', True, 'runs on every device that has no other backend'),
    ]


def _check_gpu(cuda: Backend) -> Backend:
    """Whether CUDA kernels that were loaded have a GPU to run on."""
    if not cuda.available:
        return cuda
    if not torch.cuda.is_available():
        why, fix = 'torch sees no GPU', 'Check nvidia-smi and the driver'
    elif _runs_on(torch.cuda.get_device_capability(), cuda.archs):
        return cuda
    else:
        major, minor = torch.cuda.get_device_capability()
        why = f'this GPU is {major}.{minor}'
        fix = f'Reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}'
    return replace(cuda, available=False, why=f'{cuda.why}, but {why}', fix=fix)


def _check_triton(triton: Backend) -> Backend:
    """Whether Triton's kernels have a GPU to run on, and whether they do."""
    if not triton.available:
        return triton
    if not torch.cuda.is_available():
        fix = 'Check nvidia-smi and the driver'
        return replace(triton, available=False, why=f'{triton.why}, but torch sees no GPU', fix=fix)
    role = 'serves GPUs' if triton_serves_gpus() else 'not needed, CUDA kernels are there'
    return replace(triton, why=f'{triton.why}, {role}')


def _runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for ``archs`` runs on a GPU: the same major version, or PTX of an older one."""
    for arch in archs.replace(' ', ';').split(';'):
        numbers = re.match(r'(\d+)\.(\d+)', arch)
        if not numbers:  # a name such as Hopper
            return True
        built_for = (int(numbers[1]), int(numbers[2]))
        if built_for <= capability and ('+PTX' in arch or built_for[0] == capability[0]):
            return True
    return False
