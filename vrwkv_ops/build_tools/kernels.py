"""Compile the kernels and record what was compiled.

Two libraries, one for the CPU and one for CUDA, are compiled apart from each other. They hold no
Python code: ``torch.ops.load_library`` loads them, and one wheel serves every Python version. An
install without CPU kernels must be asked for by name. Environment variables:

- ``FORCE_CUDA=1``: compile for CUDA even where no GPU is visible; fail if that is impossible.
- ``TORCH_CUDA_ARCH_LIST``: architectures to compile for, e.g. ``8.0;9.0+PTX``.
- ``VRWKV_OPS_SKIP_CUDA=1``: no CUDA kernels.
- ``VRWKV_OPS_SKIP_BUILD=1``: no compiled kernels at all.
- ``CXX``, ``CUDA_HOME``, ``MAX_JOBS``: as for any PyTorch extension.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / 'csrc'
LIBRARIES = {'cpu': 'libvrwkv_ops_cpu.so', 'cuda': 'libvrwkv_ops_cuda.so'}
BUILD_INFO = '_build_info.json'
DEFAULT_CUDA_ARCHS = ('8.0', '9.0', '12.0')
OLDEST_TORCH = (2, 4)

# No -ffast-math: infinities and NaN keep their meaning. No -march: an installed file may move.
# No contraction: every optimisation level gives the same numbers (only the sign of NaN may differ).
CXX_FLAGS = [
    *('-g0', '-fPIC', '-fopenmp'),
    *('-fno-math-errno', '-fno-trapping-math', '-ffp-contract=off'),
]
# cpu_kernels.cpp is compiled once for each instruction set. The portable kernels serve all
# processors but x86-64; there they serve those older than 2013 only, and compile time matters more.
INSTRUCTION_SETS = {'portable': ['-O3']}
if platform.machine() == 'x86_64':
    INSTRUCTION_SETS = {
        'avx2': ['-O3', '-DVRWKV_CPU_AVX2'],
        'avx512': ['-O3', '-DVRWKV_CPU_AVX512'],
        'portable': ['-O1'],
    }


@dataclass(frozen=True)
class Machine:
    """Machine properties that affect the build."""

    platform_problem: str = ''  # why kernels cannot be compiled for this platform
    torch: str | None = None  # version
    torch_problem: str = ''  # why it could not be imported
    torch_cuda: str | None = None  # CUDA version that torch was built with
    cxx_problem: str = ''  # why no C++ compiler works
    cuda_home: str | None = None
    nvcc_cuda: str | None = None
    nvcc_archs: tuple[str, ...] = ()  # architectures that nvcc can compile for
    gpu_archs: tuple[str, ...] = ()  # architectures of the visible GPUs


@dataclass
class Part:
    """Whether the kernels for one kind of device are compiled; if not, why, and what to do."""

    built: bool
    why: str = ''
    fix: str = ''
    archs: str = ''
    file: str = ''


def is_set(env: Mapping[str, str], name: str) -> bool:
    """Return whether an environment variable switches something on."""
    return env.get(name, '').strip().lower() not in ('', '0', 'false', 'no', 'off')


def plan(env: Mapping[str, str], machine: Machine) -> dict[str, Part]:
    """Decide what to compile.

    Raises:
        SetupError: If the CPU kernels cannot be compiled and ``VRWKV_OPS_SKIP_BUILD`` is not set,
            or if ``FORCE_CUDA`` asks for what is impossible.
    """
    force_cuda = is_set(env, 'FORCE_CUDA')
    switches = ('VRWKV_OPS_SKIP_BUILD', 'VRWKV_OPS_SKIP_CUDA')
    skip = next((name for name in switches if is_set(env, name)), None)
    if skip and force_cuda:
        raise SetupError(f'FORCE_CUDA and {skip} are both set and contradict: unset one')
    skipped = Part(False, f'{skip} was set when vrwkv_ops was installed', 'Unset it and reinstall')
    if skip == 'VRWKV_OPS_SKIP_BUILD':
        return {'cpu': skipped, 'cuda': skipped}
    if problem := _cpu_problem(machine):
        raise SetupError(problem)
    cuda = skipped if skip else _plan_cuda(env, machine, force_cuda)
    if force_cuda and not cuda.built:
        raise SetupError(f'FORCE_CUDA is set, but {cuda.why}. {cuda.fix}')
    return {'cpu': Part(True), 'cuda': cuda}


def _cpu_problem(machine: Machine) -> str:
    """Return why the CPU kernels cannot be compiled and what to type; '' if they can."""
    pip = _pip()
    without = f'VRWKV_OPS_SKIP_BUILD=1 {pip} install ./vrwkv_ops (much slower)'
    if machine.platform_problem:
        return (
            f'vrwkv_ops: {machine.platform_problem}. To install without kernels, which is much '
            'slower, set the environment variable VRWKV_OPS_SKIP_BUILD=1 and install again'
        )
    if machine.torch is None:
        return (
            f'vrwkv_ops: this build does not find torch ({machine.torch_problem}), for which the '
            f"kernels must be compiled. Type: {pip} install torch 'setuptools>=77' && "
            f'{pip} install --no-build-isolation ./vrwkv_ops'
        )
    if _release(machine.torch) < OLDEST_TORCH:
        return (
            f'vrwkv_ops: torch {machine.torch} is too old, 2.4 or newer is needed. '
            f"Type: {pip} install --upgrade 'torch>=2.4', then install vrwkv_ops again"
        )
    if machine.cxx_problem:
        return (
            f'vrwkv_ops: {machine.cxx_problem}. Install one (Debian, Ubuntu: apt-get install g++) '
            f'or set CXX, or install without kernels: {without}'
        )
    return ''


def _pip() -> str:
    return 'uv pip' if 'UV' in os.environ else 'pip'  # uv sets UV for the builds that it starts


def _plan_cuda(env: Mapping[str, str], machine: Machine, force: bool) -> Part:
    if machine.torch_cuda is None:
        return Part(
            False,
            f'torch {machine.torch} is a build without CUDA',
            'Install a CUDA build of torch, then reinstall',
        )
    problem = ''
    if machine.cuda_home is None:
        problem = 'no nvcc was found'
    elif machine.nvcc_cuda and _release(machine.nvcc_cuda)[0] != _release(machine.torch_cuda)[0]:
        problem = f'nvcc is of CUDA {machine.nvcc_cuda}, and torch of {machine.torch_cuda}'
    if problem:
        return Part(
            False,
            problem,
            f'Install CUDA toolkit {machine.torch_cuda} or point CUDA_HOME to it, then reinstall',
        )
    if not machine.gpu_archs and not force:
        return Part(
            False,
            'torch saw no GPU when vrwkv_ops was built',
            'Reinstall where a GPU is visible, or with FORCE_CUDA=1',
        )
    return Part(True, archs=env.get('TORCH_CUDA_ARCH_LIST', '').strip() or _default_archs(machine))


def _default_archs(machine: Machine) -> str:
    """Return the visible GPUs; without any, common ones that nvcc and torch know."""
    if machine.gpu_archs:
        return ';'.join(machine.gpu_archs) + '+PTX'
    # torch's own table of architectures has 12.0 from 2.7 on.
    new_torch = _release(machine.torch) >= (2, 7)
    archs = [
        arch
        for arch in DEFAULT_CUDA_ARCHS
        if arch in machine.nvcc_archs and (new_torch or arch != '12.0')
    ]
    return ';'.join(archs) + '+PTX' if archs else '8.0+PTX'


def _release(version: str) -> tuple[int, ...]:
    """Return major and minor version."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:2])


def inspect_machine() -> Machine:
    """Look at the platform, torch, the compilers and the GPUs."""
    problem = _platform_problem(sys.platform, platform.machine(), sys.maxsize)
    if problem:
        return Machine(platform_problem=problem)
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch may raise anything
        return Machine(torch_problem=f'{type(error).__name__}: {error}')
    cuda_home, nvcc_cuda, nvcc_archs = _find_cuda(cpp_extension)
    gpus = range(torch.cuda.device_count()) if torch.version.cuda else ()
    # A GPU may be newer than torch or nvcc: PTX for the newest GPU that both know serves it.
    numbers = re.findall(r'sm_(\d+)', ' '.join(torch.cuda.get_arch_list()))
    known = [(int(n[:-1]), int(n[-1])) for n in numbers], map(_release, nvcc_archs)
    newest = min(max(archs, default=(99, 0)) for archs in known)
    capabilities = sorted({min(newest, torch.cuda.get_device_capability(i)) for i in gpus})
    return Machine(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        cxx_problem=_cxx_problem(_cxx()),
        cuda_home=cuda_home,
        nvcc_cuda=nvcc_cuda,
        nvcc_archs=nvcc_archs,
        gpu_archs=tuple(f'{major}.{minor}' for major, minor in capabilities),
    )


def _platform_problem(system: str, machine: str, maxsize: int) -> str:
    if system != 'linux':
        return f'the kernels compile on Linux only, and this is {system}'
    if maxsize < 2**32:
        return f'the kernels need a 64-bit Python, and this one has 32 bits ({machine})'
    return ''


def _cxx() -> list[str]:
    if command := shlex.split(os.environ.get('CXX', '')):
        return command
    return [next(filter(shutil.which, ('c++', 'g++', 'clang++')), 'c++')]


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


def _find_cuda(cpp_extension) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the CUDA toolkit that torch finds, and its nvcc's version and architectures."""
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, 'bin', 'nvcc').exists():
        return None, None, ()
    nvcc = str(Path(home, 'bin', 'nvcc'))
    if not Path(home, 'include', 'cuda_runtime.h').exists():
        # A wrapper in some bin folder; nvcc itself tells where its toolkit is.
        with tempfile.NamedTemporaryFile(suffix='.cu') as source:
            dry_run = _output([nvcc, '--dryrun', source.name])
        top = re.search(r'^#\$ TOP=(.*)$', dry_run, re.MULTILINE)
        if top:
            home = cpp_extension.CUDA_HOME = os.path.realpath(top[1].strip())
    numbers = re.findall(r'compute_(\d+)', _output([nvcc, '--list-gpu-arch']))
    version = re.search(r'release (\d+\.\d+)', _output([nvcc, '--version']))
    return home, version and version[1], tuple(f'{n[:-1]}.{n[-1]}' for n in numbers)


def _output(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout


# --- Compiling --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A compiler call that makes one object file."""

    name: str
    words: tuple[str, ...]
    target: Path


def compile_commands(parts: Mapping[str, Part], cuda_home: str | None, folder: Path) -> dict:
    """Return the compiler calls of each part that is built, the slowest first."""
    import torch
    from torch.utils import cpp_extension

    # torch's own extension builder names the C++ standard that its headers need.
    standards = re.findall(r'-std=(c\+\+\d\d)', Path(cpp_extension.__file__).read_text())
    common = [f'-std={max(standards, default="c++17")}']
    common.append(f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}')
    cxx = [*_cxx(), *CXX_FLAGS, *common]

    def command(compiler: list[str], source: Path, variant: str = '') -> Command:
        name = f'{source.relative_to(CSRC)}{variant and f" for {variant}"}'
        target = folder / f'{name.replace("/", "-").replace(" ", "-")}.o'
        return Command(name, (*compiler, '-c', str(source), '-o', str(target)), target)

    commands = {}
    if parts['cpu'].built:
        headers = _system_headers(cpp_extension.include_paths())
        commands['cpu'] = [
            command([*cxx, *headers, *flags], source, variant)
            for source in sorted(CSRC.glob('*/cpu_kernels.cpp'))
            for variant, flags in INSTRUCTION_SETS.items()
        ]
        sources = [*CSRC.glob('*/cpu.cpp'), *CSRC.glob('*.cpp')]
        commands['cpu'] += [command([*cxx, '-O1', *headers], source) for source in sorted(sources)]
    if parts['cuda'].built:
        os.environ['TORCH_CUDA_ARCH_LIST'] = parts['cuda'].archs
        headers = _system_headers(cpp_extension.include_paths('cuda'))
        flags = [*common, *headers, '-DVRWKV_OPS_WITH_CUDA']
        nvcc = [str(Path(cuda_home, 'bin', 'nvcc')), '-O3', '-Xcompiler', '-fPIC']
        if os.environ.get('CXX'):  # the compiler, without ccache before it and flags behind it
            nvcc += ['-ccbin', [word for word in _cxx() if not word.startswith('-')][-1]]
        nvcc += [*cpp_extension.COMMON_NVCC_FLAGS, *cpp_extension._get_cuda_arch_flags()]
        commands['cuda'] = [
            *(command([*nvcc, *flags], source) for source in sorted(CSRC.glob('*/cuda.cu'))),
            command([*cxx, '-O1', *flags], CSRC / 'registration.cpp', 'cuda'),
        ]
    return commands


def _system_headers(folders: list[str]) -> list[str]:
    return [word for folder in folders for word in ('-isystem', folder)]


def compile_all(commands: list[Command]) -> None:
    """Run compiler calls on all cores, and print each that is done.

    Raises:
        SetupError: If a call fails; the compiler's output has been printed.
    """
    jobs = int(os.environ.get('MAX_JOBS') or len(os.sched_getaffinity(0)))
    start = time.monotonic()
    sys.stderr.write(f'vrwkv_ops: compiling {len(commands)} files, {jobs} at a time\n')
    sys.stderr.flush()

    def call(command: Command) -> str:
        command.target.parent.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(
            command.words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode:
            raise SetupError(f'{shlex.join(command.words)}\n{result.stdout}')
        return result.stdout

    with ThreadPoolExecutor(jobs) as pool:
        calls = {pool.submit(call, command): command for command in commands}
        for done, future in enumerate(as_completed(calls), 1):
            try:
                output = future.result()
            except SetupError:
                pool.shutdown(cancel_futures=True)
                raise
            name, seconds = calls[future].name, time.monotonic() - start
            sys.stderr.write(f'[{done}/{len(commands)}] {name} ({seconds:.0f} s)\n{output}')
            sys.stderr.flush()


def link(objects: list[Path], target: Path, cuda: bool) -> None:
    """Link a library against torch.

    Raises:
        SetupError: If the linker fails.
    """
    from torch.utils import cpp_extension

    libraries = ['c10', 'torch', 'torch_cpu']
    if cuda:
        libraries += ['cudart', 'c10_cuda', 'torch_cuda']
    folders = cpp_extension.library_paths(*(['cuda'] if cuda else []))
    words = [*_cxx(), '-shared', '-fopenmp', *map(str, objects), '-o', str(target)]
    words += [*(f'-L{folder}' for folder in folders), *(f'-l{name}' for name in libraries)]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SetupError(f'{shlex.join(words)}\n{result.stdout}')


# --- setuptools -------------------------------------------------------------------------------


class BuildKernels(build_ext):
    """The ``build_ext`` command: compile what :func:`plan` says and write the record."""

    def run(self) -> None:
        """Compile.

        Raises:
            SetupError: If the kernels cannot be compiled; the message says what to type.
        """
        machine = inspect_machine()
        parts = plan(os.environ, machine)
        package = self._package()
        package.mkdir(parents=True, exist_ok=True)
        if parts['cpu'].built:
            self._build(parts, machine.cuda_home, package)
        for name, part in parts.items():
            if not part.built:
                package.joinpath(LIBRARIES[name]).unlink(missing_ok=True)  # of an earlier build
                self.warn(f'vrwkv_ops: no {name} kernels: {part.why}. {part.fix}.')
        record = {
            'torch': machine.torch,
            'torch_cuda': machine.torch_cuda,
            **{name: asdict(part) for name, part in parts.items()},
        }
        package.joinpath(BUILD_INFO).write_text(json.dumps(record, indent=2) + '\n')

    def _build(self, parts: dict[str, Part], cuda_home: str | None, package: Path) -> None:
        objects = Path(self.build_temp).absolute()
        shutil.rmtree(objects, ignore_errors=True)
        commands = compile_commands(parts, cuda_home, objects)
        try:
            # CUDA files take the longest.
            compile_all([*commands.get('cuda', ()), *commands.get('cpu', ())])
            for name, part in commands.items():
                files = [command.target for command in part]
                link(files, package / LIBRARIES[name], cuda=name == 'cuda')
                parts[name].file = LIBRARIES[name]
        except SetupError as error:
            cuda = ' Without CUDA kernels: VRWKV_OPS_SKIP_CUDA=1.' if 'cuda' in commands else ''
            raise SetupError(
                f'{error}\nvrwkv_ops: the kernels do not compile, see above.{cuda} To install '
                f'without kernels: VRWKV_OPS_SKIP_BUILD=1 {_pip()} install ./vrwkv_ops'
            ) from None

    def get_outputs(self) -> list[str]:
        """Return the files that a wheel takes from this command."""
        package = self._package()
        files = [package / name for name in (*LIBRARIES.values(), BUILD_INFO)]
        return [str(path) for path in files if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable install has the files in place."""
        return {}

    def get_source_files(self) -> list[str]:
        """Return nothing: MANIFEST.in names the sources."""
        return []

    def _package(self) -> Path:
        if self.inplace or getattr(self, 'editable_mode', False):
            return Path(self.get_finalized_command('build_py').get_package_dir('vrwkv_ops'))
        return Path(self.build_lib, 'vrwkv_ops')


class Wheel(bdist_wheel):
    """The ``bdist_wheel`` command: the kernels serve every Python 3 on their platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform of the wheel."""
        return 'py3', 'none', super().get_tag()[2]
