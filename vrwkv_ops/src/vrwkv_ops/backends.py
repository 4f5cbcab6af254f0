"""Load the compiled kernels, and explain which backends are available and why others are not."""

import importlib.metadata
import importlib.util
import json
import re
import shlex
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

_PACKAGE = Path(__file__).resolve().parent
_BUILD_INFO = _PACKAGE / '_build_info.json'
_TITLES = {'cpu': 'C++ kernels for the CPU', 'cuda': 'CUDA kernels'}
_TRITON = 'Triton kernels'


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: Its name.
        available: Whether it can be used now.
        why: What it was compiled for, or why it is not available.
        fix: How to make it available; empty if it is.
        archs: GPU architectures that it was compiled for.
    """

    name: str
    available: bool
    why: str
    fix: str = ''
    archs: str = ''

    def __str__(self) -> str:
        """Format as one or two lines."""
        line = f'[{"x" if self.available else " "}] {self.name}: {self.why}'
        return f'{line}\n      {self.fix}' if self.fix else line


_loaded: dict[str, Backend] = {}
_warned: set[str] = set()


def load() -> None:
    """Load the compiled kernels; ``definitions.complete`` then adds what they lack."""
    try:
        info = json.loads(_BUILD_INFO.read_text())
    except FileNotFoundError:
        info = None
    for device_type in _TITLES:
        _loaded[device_type] = _load_part(device_type, info)
    _loaded['triton'] = _find_triton()


def triton_serves_gpus() -> bool:
    """Return whether Triton replaces missing CUDA kernels."""
    return _loaded['triton'].available and not _loaded['cuda'].available


def triton_failed(why: str) -> None:
    """Record that Triton does not work on a GPU here; the scan serves it and warns."""
    fix = f'Compile the CUDA kernels: {reinstall_command()}'
    _loaded['triton'] = Backend(_TRITON, False, f'they do not work here ({why})', fix)


def reinstall_command() -> str:
    """Return the command that compiles this copy again, for the way in which it was installed."""
    options = 'pip install --force-reinstall --no-deps --no-build-isolation'
    try:
        distribution = importlib.metadata.distribution('vrwkv-ops')
        origin = json.loads(distribution.read_text('direct_url.json') or '{}')
        installer = (distribution.read_text('INSTALLER') or '').strip()
    except importlib.metadata.PackageNotFoundError:  # a source folder on PYTHONPATH
        return f'{options} -e {shlex.quote(str(_PACKAGE.parents[1]))}'
    if installer == 'uv':
        options = f'uv {options}'
    url = origin.get('url', '')
    if vcs := origin.get('vcs_info'):
        commit, folder = vcs['commit_id'], origin.get('subdirectory', '')
        return f"{options} '{vcs['vcs']}+{url}@{commit}#subdirectory={folder}'"
    if 'dir_info' in origin:
        editable = '-e ' if origin['dir_info'].get('editable') else ''
        return f'{options} {editable}{shlex.quote(unquote(urlparse(url).path))}'
    return f'{options} <the sources of vrwkv_ops>'  # installed from a wheel


def _find_triton() -> Backend:
    """Return whether Triton is installed, without importing it."""
    if importlib.util.find_spec('triton') is None:
        fix = "Install it ('pip install triton'), or a build of torch that includes it"
        return Backend(_TRITON, False, 'Triton is not installed', fix)
    try:
        version = importlib.metadata.version('triton')
    except importlib.metadata.PackageNotFoundError:  # e.g. pytorch-triton, of a nightly torch
        version = 'of unknown version'
    return Backend(_TRITON, True, f'Triton {version}')


def _load_part(device_type: str, info: dict | None) -> Backend:
    title = _TITLES[device_type]
    if info is None:
        why = 'they were not compiled for this copy of vrwkv_ops'
        return Backend(title, False, why, f'Compile them: {reinstall_command()}')
    part = info[device_type]
    if not part['built']:
        return Backend(title, False, part['why'], f'{part["fix"]}: {reinstall_command()}')

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
        fix = f'Reinstall: {reinstall_command()}'
        warnings.warn(
            f'vrwkv_ops: {title} are not used: {problem}. {fix}',
            RuntimeWarning,
            stacklevel=2,
        )
        _warned.add(device_type)
        return Backend(title, False, problem, fix)
    archs = f', GPU architectures {part["archs"]}' if part['archs'] else ''
    return Backend(title, True, f'compiled for {built_for}{archs}', archs=part['archs'])


def _abi(torch_version: str, cuda_version: str | None) -> tuple:
    """Return what must be equal at build and run time: torch's minor and CUDA's major version."""
    release = torch_version.split('+')[0].split('.')[:2]
    return (*release, cuda_version and cuda_version.split('.')[0])


def warn_if_slow(device: torch.device) -> None:
    """Warn once per kind of device that the pure-PyTorch scan replaces compiled kernels."""
    backend = _loaded.get(device.type)
    if backend is None or device.type in _warned:
        return
    _warned.add(device.type)
    triton = ''
    if device.type == 'cuda' and 'triton' in _loaded and not _loaded['triton'].available:
        triton = f'{_TRITON}: {_loaded["triton"].why}. '
    warnings.warn(
        f'vrwkv_ops: running the slower pure-PyTorch implementation on {device.type}, because the '
        f'{backend.name} are not available: {backend.why}. {backend.fix}. {triton}'
        "'python -m vrwkv_ops' shows all backends",
        RuntimeWarning,
        stacklevel=2,
    )


def diagnose() -> list[Backend]:
    """Return all backends, the fastest first."""
    return [
        _check_gpu(_loaded['cuda']),
        _check_triton(_loaded['triton']),
        _loaded['cpu'],
        Backend('pure-PyTorch scan', True, 'runs on every device that has no other backend'),
    ]


def _check_gpu(cuda: Backend) -> Backend:
    """Return the CUDA backend, unavailable if there is no GPU that it runs on."""
    if not cuda.available:
        return cuda
    if not torch.cuda.is_available():
        why, fix = 'torch sees no GPU', 'Check nvidia-smi and the driver'
    elif _runs_on(torch.cuda.get_device_capability(), cuda.archs):
        return cuda
    else:
        major, minor = torch.cuda.get_device_capability()
        why = f'this GPU is {major}.{minor}'
        fix = f'Reinstall: TORCH_CUDA_ARCH_LIST={major}.{minor} {reinstall_command()}'
    return replace(cuda, available=False, why=f'{cuda.why}, but {why}', fix=fix)


def _check_triton(triton: Backend) -> Backend:
    """Return the Triton backend, unavailable if there is no GPU, and whether it is used."""
    if not triton.available:
        return triton
    if not torch.cuda.is_available():
        fix = 'Check nvidia-smi and the driver'
        return replace(triton, available=False, why=f'{triton.why}, but torch sees no GPU', fix=fix)
    role = 'serves GPUs' if triton_serves_gpus() else 'not needed beside the CUDA kernels'
    return replace(triton, why=f'{triton.why}, {role}')


def _runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Return whether code for ``archs`` runs on a GPU: the same major version or older PTX."""
    for arch in archs.replace(' ', ';').split(';'):
        numbers = re.match(r'(\d+)\.(\d+)', arch)
        if not numbers:  # a name such as Hopper
            return True
        built_for = (int(numbers[1]), int(numbers[2]))
        if built_for <= capability and ('+PTX' in arch or built_for[0] == capability[0]):
            return True
    return False
