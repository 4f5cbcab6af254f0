"""Builds the compiled kernels as far as the machine allows, and records what was built.

Two extension modules, ``vrwkv_ops._C`` (CPU) and ``vrwkv_ops._C_cuda``, are built apart from each
other, so that one may fail or be left out. A failure is no error, since the package works without
them, unless ``FORCE_CUDA=1`` asked for CUDA. Environment variables:

- ``FORCE_CUDA=1``: build for CUDA even where no GPU is in sight; fail if that is impossible.
- ``TORCH_CUDA_ARCH_LIST``: architectures to build for, e.g. ``8.0;9.0+PTX``.
- ``VRWKV_OPS_SKIP_CUDA=1``: no CUDA kernels.
- ``VRWKV_OPS_SKIP_BUILD=1``: no compiled kernels at all.
- ``CXX``, ``CUDA_HOME``, ``MAX_JOBS``: as for any PyTorch extension.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
MODULES = {'cpu': 'vrwkv_ops._C', 'cuda': 'vrwkv_ops._C_cuda'}
SOURCES = {'cpu': ('csrc/*.cpp', 'csrc/cpu/*.cpp'), 'cuda': ('csrc/*.cpp', 'csrc/cuda/*.cu')}
BUILD_INFO = '_build_info.json'
DEFAULT_CUDA_ARCHS = ('8.0', '9.0', '12.0')

# No -ffast-math: infinities and NaN keep their meaning. No -march: an installed file may move.
CXX_FLAGS = ['-O3', '-g0', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=off']
NVCC_FLAGS = ['-O3']
# at::parallel_for is a header and needs it; Apple's clang has no OpenMP.
OPENMP_FLAGS = [] if sys.platform == 'darwin' else ['-fopenmp']


@dataclass(frozen=True)
class Machine:
    """What of the machine bears on the build."""

    torch: str | None = None  # version
    torch_problem: str = ''  # why it could not be imported
    torch_cuda: str | None = None  # CUDA version that torch was built with
    cxx_problem: str = ''  # why no C++ compiler works
    cuda_home: str | None = None
    nvcc_archs: tuple[str, ...] = ()  # what nvcc can compile for
    gpu_archs: tuple[str, ...] = ()  # of the GPUs in sight


@dataclass
class Part:
    """Whether the kernels for one kind of device are built; if not, why, and what to do."""

    built: bool
    why: str = ''
    fix: str = ''
    archs: str = ''
    file: str = ''


def is_set(env: Mapping[str, str], name: str) -> bool:
    """Whether an environment variable switches something on."""
    return env.get(name, '').strip().lower() not in ('', '0', 'false', 'no', 'off')


def plan(env: Mapping[str, str], machine: Machine) -> dict[str, Part]:
    """Decides what to build.

    Raises:
        SetupError: If ``FORCE_CUDA`` asks for what is impossible.
    """
    force_cuda = is_set(env, 'FORCE_CUDA')
    for name in ('VRWKV_OPS_SKIP_BUILD', 'VRWKV_OPS_SKIP_CUDA'):
        if force_cuda and is_set(env, name):
            raise SetupError(f'FORCE_CUDA and {name} are both set and contradict: unset one')

    cpu = _plan_cpu(env, machine)
    cuda = _plan_cuda(env, machine, force_cuda) if cpu.built else Part(False, cpu.why, cpu.fix)
    if force_cuda and not cuda.built:
        raise SetupError(f'FORCE_CUDA is set, but {cuda.why}. {cuda.fix}')
    return {'cpu': cpu, 'cuda': cuda}


def _plan_cpu(env: Mapping[str, str], machine: Machine) -> Part:
    if is_set(env, 'VRWKV_OPS_SKIP_BUILD'):
        return Part(
            False,
            'VRWKV_OPS_SKIP_BUILD was set when vrwkv_ops was installed',
            'Unset it and reinstall',
        )
    if machine.torch is None:
        return Part(
            False,
            f'torch could not be imported when vrwkv_ops was built ({machine.torch_problem})',
            'Install torch first, then reinstall with --no-build-isolation',
        )
    if machine.cxx_problem:
        return Part(
            False,
            machine.cxx_problem,
            'Install a C++ compiler (e.g. the package g++) or point CXX to one, then reinstall',
        )
    return Part(True)


def _plan_cuda(env: Mapping[str, str], machine: Machine, force: bool) -> Part:
    if is_set(env, 'VRWKV_OPS_SKIP_CUDA'):
        return Part(
            False,
            'VRWKV_OPS_SKIP_CUDA was set when vrwkv_ops was installed',
            'Unset it and reinstall',
        )
    if machine.torch_cuda is None:
        return Part(
            False,
            f'torch {machine.torch} is a build without CUDA',
            'Install a CUDA build of torch, then reinstall',
        )
    if machine.cuda_home is None:
        return Part(
            False,
            'no nvcc was found',
            f'Install CUDA toolkit {machine.torch_cuda} or point CUDA_HOME to it, then reinstall',
        )
    if not machine.gpu_archs and not force:
        return Part(
            False,
            'torch saw no GPU when vrwkv_ops was built',
            'Reinstall where a GPU is in sight, or with FORCE_CUDA=1 to build for others',
        )
    return Part(True, archs=env.get('TORCH_CUDA_ARCH_LIST', '').strip() or _default_archs(machine))


def _default_archs(machine: Machine) -> str:
    """The GPUs in sight; where there are none, those most in use that nvcc and torch know."""
    if machine.gpu_archs:
        return ';'.join(machine.gpu_archs)
    # torch's own table of architectures has 12.0 from 2.7 on.
    new_torch = tuple(int(n) for n in re.findall(r'\d+', machine.torch)[:2]) >= (2, 7)
    archs = [
        arch
        for arch in DEFAULT_CUDA_ARCHS
        if arch in machine.nvcc_archs and (new_torch or arch != '12.0')
    ]
    return ';'.join(archs) + '+PTX' if archs else '8.0+PTX'


def inspect_machine() -> Machine:
    """Looks at torch, compilers and GPUs of the running environment."""
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch may raise anything, and must not stop the install
        return Machine(torch_problem=f'{type(error).__name__}: {error}')
    cuda_home, nvcc_archs = _find_cuda(cpp_extension)
    gpus = range(torch.cuda.device_count()) if torch.version.cuda else ()
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in gpus})
    return Machine(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cxx_problem=_cxx_problem(shlex.split(os.environ.get('CXX', 'c++'))),
        cuda_home=cuda_home,
        nvcc_archs=nvcc_archs,
        gpu_archs=tuple(f'{major}.{minor}' for major, minor in capabilities),
    )


def _cxx_problem(compiler: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text('#include <vector>\nint main() { return 0; }\n')
        name = shlex.join(compiler)
        try:
            subprocess.run(
                [*compiler, str(source), '-o', str(Path(folder, 'probe'))],
                check=True,
                capture_output=True,
                text=True,
            )
        except OSError:
            return f"no C++ compiler was found ('{name}')"
        except subprocess.CalledProcessError as error:
            detail = error.stderr.strip().splitlines()
            return f"the C++ compiler '{name}' does not work" + (f': {detail[0]}' if detail else '')
    return ''


def _find_cuda(cpp_extension) -> tuple[str | None, tuple[str, ...]]:
    """The CUDA toolkit that torch's build would use, and the architectures that its nvcc knows."""
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, 'bin', 'nvcc').exists():
        return None, ()
    nvcc = str(Path(home, 'bin', 'nvcc'))
    if not Path(home, 'include', 'cuda_runtime.h').exists():
        # A wrapper in some bin folder; nvcc itself tells where its toolkit is.
        with tempfile.NamedTemporaryFile(suffix='.cu') as source:
            dry_run = _output([nvcc, '--dryrun', source.name])
        top = re.search(r'^#\$ TOP=(.*)$', dry_run, re.MULTILINE)
        if top:
            home = cpp_extension.CUDA_HOME = os.path.realpath(top[1].strip())
    numbers = re.findall(r'compute_(\d+)', _output([nvcc, '--list-gpu-arch']))
    return home, tuple(f'{number[:-1]}.{number[-1]}' for number in numbers)


def _output(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout


def placeholders() -> list[Extension]:
    """What setuptools must know before torch is imported: that there may be extension modules."""
    return [Extension(name, _sources(part)) for part, name in MODULES.items()]


def _sources(part: str) -> list[str]:
    found = (path for pattern in SOURCES[part] for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


class BuildKernels(build_ext):
    """The ``build_ext`` command: builds what :func:`plan` says and writes the record."""

    def run(self) -> None:
        """Builds; raises only where ``FORCE_CUDA`` is set."""
        machine = inspect_machine()
        parts = plan(os.environ, machine)
        inplace = bool(self.inplace or getattr(self, 'editable_mode', False))
        for name, part in parts.items():
            if not part.built:
                continue
            try:
                part.file = self._build(name, part, machine, inplace)
            # Whatever the compiler's wrappers raise, SystemExit included, the package installs.
            except (Exception, SystemExit) as error:
                if name == 'cuda' and is_set(os.environ, 'FORCE_CUDA'):
                    raise
                traceback.print_exc()
                part.built = False
                part.why = f'compilation failed ({type(error).__name__}: {error})'.splitlines()[0]
                part.fix = 'Reinstall with pip install -v to see the compiler errors'
        for name, part in parts.items():
            if not part.built:
                self.warn(f'vrwkv_ops: no {name} kernels: {part.why}. {part.fix}.')
        self.extensions = [e for e in self.extensions if parts[_part_of(e)].built]
        self._write_record(machine, parts, inplace)

    def _build(self, name: str, part: Part, machine: Machine, inplace: bool) -> str:
        from torch.utils import cpp_extension

        cuda = name == 'cuda'
        if cuda:
            os.environ['TORCH_CUDA_ARCH_LIST'] = part.archs
        make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
        cxx_flags = CXX_FLAGS + OPENMP_FLAGS
        extension = make(
            MODULES[name],
            _sources(name),
            define_macros=[('VRWKV_OPS_WITH_CUDA', None)] if cuda else [],
            extra_compile_args={'cxx': cxx_flags, 'nvcc': NVCC_FLAGS},
            extra_link_args=OPENMP_FLAGS,
        )
        declared, self.distribution.ext_modules = self.distribution.ext_modules, [extension]
        try:
            builder = cpp_extension.BuildExtension(
                self.distribution, use_ninja=cpp_extension.is_ninja_available()
            )
            builder.ensure_finalized()
        finally:
            self.distribution.ext_modules = declared
        builder.inplace = inplace
        builder.build_lib = self.build_lib
        # Objects of another torch must not be reused, though no source has changed.
        builder.build_temp = str(Path(self.build_temp, f'torch-{machine.torch}', name))
        builder.force = True
        builder.run()
        return Path(builder.get_ext_filename(MODULES[name])).name

    def _write_record(self, machine: Machine, parts: dict[str, Part], inplace: bool) -> None:
        if inplace:
            package = Path(self.get_finalized_command('build_py').get_package_dir('vrwkv_ops'))
        else:
            package = Path(self.build_lib, 'vrwkv_ops')
        package.mkdir(parents=True, exist_ok=True)
        for name, module in MODULES.items():
            if not parts[name].built:  # left by an earlier build
                package.joinpath(Path(self.get_ext_filename(module)).name).unlink(missing_ok=True)
        record = {
            'torch': machine.torch,
            'torch_cuda': machine.torch_cuda,
            **{name: asdict(part) for name, part in parts.items()},
        }
        package.joinpath(BUILD_INFO).write_text(json.dumps(record, indent=2) + '\n')


def _part_of(extension: Extension) -> str:
    return next(part for part, name in MODULES.items() if name == extension.name)
