"""Install what `make demo` and `make test` need into a virtual environment.

Run by the Makefile; it uses the standard library only, since nothing is installed yet. Each step
leaves a stamp in the environment once its result has been imported, so that a second run does
nothing and an interrupted one repairs what it finds and goes on.
"""

import argparse
import csv
import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
FLAVOURS = ('openmmlab', 'onedl')
PACKAGES = (  # those of other tasks come when they are there
    'vrwkv',
    'classification/vrwkv_cls',
    'detection/vrwkv_det',
    'segmentation/vrwkv_seg',
)
DISK_GIB = 10  # torch's CUDA build unpacks to 5 GB; the rest is downloads and what gets compiled
HEARTBEAT_SECONDS = 20
COMPILED_FOR_CPU = """
import sys
from vrwkv_ops.backends import diagnose
[cpu] = [backend for backend in diagnose() if 'CPU' in backend.name]
cpu.available or sys.exit(f'{cpu.why}. {cpu.fix}')
"""


class InstallError(Exception):
    """An error whose message tells the user what to do."""


def say(message):
    """Print one line of progress at once, also into a pipe."""
    print(f'[install] {message}', flush=True)


def pins(path):
    """Return the requirements in a file, without comments."""
    lines = (line.partition('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def digest(paths, *facts):
    """Hash files (by content; by what they require) and facts (by value) into a stamp's key."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(f'{path.relative_to(ROOT)}\0'.encode())
        sha.update(json.dumps(pins(path)).encode() if path.suffix == '.txt' else path.read_bytes())
    sha.update(json.dumps(facts).encode())
    return sha.hexdigest()


def duration(seconds):
    """Format seconds as '3 min 05 s'."""
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def check_venv_module():
    """Refuse a Python that cannot make virtual environments."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise InstallError(
            f'{sys.executable} cannot make virtual environments (no module {error.name}). '
            'On Debian and Ubuntu: apt install python3-venv'
        ) from error


def check_disk(folder):
    """Refuse to start an install that would fill the disk."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    if free < DISK_GIB:
        raise InstallError(
            f'{free:.1f} GiB are free under {folder}, and the install needs about {DISK_GIB}. Free '
            'some space, or choose another disk: make demo VENV=/path/to/venv'
        )


def check_compiler():
    """Refuse to compile without a C++17 compiler and Python's headers."""
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise InstallError(
            f'No C++ compiler was found ({", ".join(names)}). On Debian and Ubuntu: apt install '
            'g++; on Fedora: dnf install gcc-c++; or set CXX. (VRWKV_OPS_SKIP_BUILD=1 makes the '
            'demo go on without: slower, in pure PyTorch.)'
        )
    include = sysconfig.get_path('include')
    for header, advice in (
        ('<optional>', f'{compiler} cannot compile C++17. Install g++ 9 or newer, or set CXX.'),
        (
            '<Python.h>',
            f"Python's headers are not in {include}. On Debian and Ubuntu: apt install "
            'python3-dev; on Fedora: dnf install python3-devel.',
        ),
    ):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, 'probe.cpp')
            source.write_text(f'#include {header}\nint main() {{ return 0; }}\n')
            command = [compiler, '-std=c++17', '-fsyntax-only', f'-I{include}', str(source)]
            if subprocess.run(command, capture_output=True).returncode:
                raise InstallError(advice)


def default_jobs():
    """Compile jobs that fit the cores and the memory (torch's headers take 1 GB a job)."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 1.5)))


class Environment:
    """A virtual environment, the stamps in it, and the commands that change it."""

    def __init__(self, path, flavour):
        self.path = path
        self.flavour = flavour
        self.python = path / 'bin' / 'python'
        self.state = path / '.install'
        self.site = Path(
            sysconfig.get_path(
                'purelib', 'posix_prefix', vars={'base': str(path), 'platbase': str(path)}
            )
        )
        self.identity = [sys.version, str(path), flavour]
        self.changing = self.state / 'changing'

    # Stamps

    def stamped(self, step):
        """Return the key that `step` was last completed with, or None."""
        stamp = self.state / step
        return stamp.read_text() if stamp.is_file() else None

    def stamp(self, step, key):
        """Record that `step` is complete."""
        temporary = self.state / f'{step}.new'
        temporary.write_text(key)
        temporary.replace(self.state / step)

    def begin(self, step):
        """Forget `step`, and mark the environment as being changed, before changing it."""
        self.changing.touch()
        (self.state / step).unlink(missing_ok=True)

    # The environment itself

    def create(self):
        """Make the environment with uv in it, or make it anew if it is broken."""
        key = digest([], *self.identity)
        if self.stamped('environment') != key or not self.python.exists():
            check_disk(self.path)
            self.clear()
            say(f'Making {self.path} with Python {sys.version.split()[0]}')
            self.state.mkdir(parents=True)
            subprocess.run([sys.executable, '-m', 'venv', str(self.path)], check=True)
            self.stamp('environment', key)
        file = REQUIREMENTS / 'bootstrap.txt'
        key = digest([file], *self.identity)
        if self.stamped('uv') != key:
            self.run('-m', 'pip', '-q', '--disable-pip-version-check', 'install', '-r', str(file))
            self.stamp('uv', key)

    def clear(self):
        """Remove an environment that is incomplete or was made by another Python."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / 'pyvenv.cfg').exists() and not self.state.exists():
            raise InstallError(
                f'{self.path} exists and is not a virtual environment: move it away, or '
                'choose another folder: make demo VENV=/path/to/venv'
            )
        say(f'{self.path} is incomplete or was made otherwise: making it anew')
        shutil.rmtree(self.path)

    def run(self, *arguments, check=True, **options):
        """Run this environment's Python."""
        return subprocess.run([str(self.python), *arguments], check=check, **options)

    def imports(self, code):
        """Return why `code` fails in this environment (the last line), or None if it runs."""
        done = self.run('-c', code, check=False, capture_output=True, text=True, cwd=self.state)
        if done.returncode == 0:
            return None
        return (done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]

    def repair(self):
        """Uninstall what an interrupted install left incomplete.

        uv links a package's files one by one, so a killed one may have metadata but not all of
        its files, and would count as installed.
        """
        say('The last install did not finish: looking for what it left incomplete')
        damaged = []
        for distribution in distributions(path=[str(self.site)]):
            # `distribution.files` leaves out missing files from Python 3.12 on.
            record = distribution.read_text('RECORD')
            if not distribution.metadata['Name'] or record is None:
                say(f'Removing incomplete {distribution._path.name}')
                shutil.rmtree(distribution._path)
                damaged.append(None)
                continue
            for name, _, size in csv.reader(record.splitlines()):
                path = self.site / name
                if size and not (path.exists() and path.stat().st_size == int(size)):
                    damaged.append(distribution.metadata['Name'])
                    break
        if damaged:
            for stamp in self.state.iterdir():
                if stamp.name not in ('environment', 'uv', self.changing.name):
                    stamp.unlink()
        if names := [name for name in damaged if name]:
            say(f'Incomplete, to be installed again: {", ".join(names)}')
            self.uv('uninstall', *names)

    # Installing

    def uv(self, command, *arguments, progress=None):
        """Run `uv pip COMMAND`; with `progress`, show the compiler's progress under that name."""
        environment = dict(os.environ)
        environment.setdefault('MAX_JOBS', str(default_jobs()))
        # Another environment may be compiling the same package: wait for its result.
        environment.setdefault('UV_LOCK_TIMEOUT', '7200')
        # The build backends of uninstalled packages find ninja here.
        environment['PATH'] = f'{self.path / "bin"}{os.pathsep}{environment.get("PATH", "")}'
        line = [str(self.python), '-m', 'uv', 'pip', command, '--python', str(self.python)]
        if progress is None:
            failed = subprocess.run([*line, *arguments], env=environment).returncode
        else:
            failed = self.watch([*line, '--verbose', *arguments], environment, progress)
        if failed:
            raise InstallError(
                f'`uv pip {command}` failed: see above. Once that is mended, the same make '
                'command goes on from here.'
            )

    def watch(self, line, environment, name):
        """Run a compiling command; print ninja's counts, or a sign of life; log the rest."""
        log = self.state / f'{name}.log'
        say(f'The whole output goes to {log}')
        process = subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)]).start()
        start = shown = time.monotonic()
        count = 'preparing'
        with log.open('w') as file:
            while True:
                try:
                    text = lines.get(timeout=HEARTBEAT_SECONDS)
                    if text is None:
                        break
                    file.write(text)
                    if found := re.search(r'\[(\d+)/(\d+)\] ', text):
                        count = f'{found[1]} of {found[2]} files compiled'
                    elif 'running build_ext' in text:
                        count = 'the first files are being compiled'
                    elif 'Waiting to acquire' in text:
                        count = 'waiting for another build of it'
                except queue.Empty:
                    file.flush()
                if time.monotonic() - shown >= HEARTBEAT_SECONDS:
                    shown = time.monotonic()
                    say(f'{name}: {count}, {duration(shown - start)}')
        if process.wait():
            print(''.join(log.read_text().splitlines(keepends=True)[-40:]), end='')
            return process.returncode
        say(f'{name}: installed in {duration(time.monotonic() - start)}')
        return 0

    def install(self, *arguments, progress=None):
        """Run `uv pip install` under the constraints that hold for every step."""
        common = [REQUIREMENTS / f'{name}.txt' for name in ('base', 'demo', 'test')]
        files = [*common, self.file('classification'), self.file('dense')]
        constraints = [option for path in files for option in ('--constraints', str(path))]
        excludes = ('--excludes', str(REQUIREMENTS / 'excludes.txt'))
        self.uv('install', *constraints, *excludes, *arguments, progress=progress)

    def file(self, name):
        """Return the requirement file of this environment's OpenMMLab flavour."""
        return REQUIREMENTS / self.flavour / f'{name}.txt'

    def step(self, name, files, code):
        """Install requirement files, unless that was done, and verify it by running `code`."""
        key = digest([REQUIREMENTS / 'excludes.txt', *files], *self.identity)
        if self.stamped(name) == key:
            return
        self.begin(name)
        say(f'Installing {name}')
        self.install(*(option for file in files for option in ('-r', str(file))))
        if reason := self.imports(code):
            raise InstallError(
                f'{name} was installed but does not work: {reason}. To start over: make clean-env'
            )
        self.stamp(name, key)


def build_facts():
    """Return what decides how an extension is compiled, other than its sources and Python."""
    torch = [line for line in pins(REQUIREMENTS / 'base.txt') if line.startswith('torch==')]
    variables = ('CXX', 'CUDA_HOME', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')
    gpu = Path('/dev/nvidiactl').exists()
    return [torch, gpu, shutil.which('nvcc'), *(os.environ.get(variable) for variable in variables)]


def install_base(environment):
    """Install torch, torchvision and the build tools."""
    if environment.stamped('base') is None:
        check_disk(environment.path)
    environment.step('base', [REQUIREMENTS / 'base.txt'], 'import torch, torchvision, numpy, cv2')


def install_mmcv(environment, operators):
    """Install mmcv, with its operators compiled if they are needed.

    mmcv-lite and mmcv (and both builds of onedl-mmcv) own the same folder, so the one is removed
    before the other is added. Classification accepts either.
    """
    build_key = digest([environment.file('mmcv')], *build_facts())
    keys = {
        'mmcv-lite': digest([environment.file('mmcv-lite')], *environment.identity),
        'mmcv': digest([], build_key, *environment.identity),
    }
    accepted = {keys['mmcv']} if operators else set(keys.values())
    if environment.stamped('mmcv') in accepted:
        return
    environment.begin('mmcv')
    environment.uv('uninstall', '-q', 'mmcv', 'mmcv-lite', 'onedl-mmcv')
    shutil.rmtree(environment.site / 'mmcv', ignore_errors=True)
    name = 'mmcv' if operators else 'mmcv-lite'
    requirements = ['-r', str(environment.file(name))]
    package = 'onedl-mmcv' if environment.flavour == 'onedl' else 'mmcv'
    if operators:
        check_compiler()
        say(
            'Installing mmcv with its operators. Compiling them takes about 10 minutes on two '
            'cores, once.'
        )
        # uv tells builds in its cache apart by their settings, not by the torch they are for.
        requirements += ['--no-build-isolation-package', package]
        requirements += ['--config-settings-package', f'{package}:build-key={build_key[:16]}']
        environment.install(*requirements, progress='mmcv')
        code = 'import mmcv.ops'
    else:
        say('Installing mmcv without compiled operators')
        requirements += ['--config-settings-package', f'{package}:build-key=lite']
        environment.install(*requirements)
        code = 'import mmcv'
    if reason := environment.imports(code):
        raise InstallError(f'{name} was installed but `{code}` fails: {reason}')
    environment.stamp('mmcv', keys[name])


def install_vrwkv_ops(environment):
    """Compile vrwkv_ops and install it in editable mode."""
    folder = ROOT / 'vrwkv_ops'
    sources = [folder / 'pyproject.toml', folder / 'setup.py', *folder.glob('build_tools/*.py')]
    sources += [path for path in folder.glob('csrc/**/*') if path.is_file()]
    skips = [os.environ.get(f'VRWKV_OPS_SKIP_{what}') for what in ('BUILD', 'CUDA')]
    facts = [*environment.identity, *build_facts(), *skips]
    key = digest(sources, *facts)
    if environment.stamped('vrwkv_ops') == key:
        return
    code = 'import vrwkv_ops'
    if not os.environ.get('VRWKV_OPS_SKIP_BUILD'):
        check_compiler()
        code += COMPILED_FOR_CPU
    environment.begin('vrwkv_ops')
    say('Compiling vrwkv_ops')
    environment.install(
        *('--no-build-isolation', '--no-deps', '--reinstall-package', 'vrwkv-ops'),
        *('-e', str(folder)),
        progress='vrwkv_ops',
    )
    if reason := environment.imports(code):
        log = environment.state / 'vrwkv_ops.log'
        raise InstallError(f'The kernels of vrwkv_ops do not work: {reason}. Build log: {log}')
    environment.run('-m', 'vrwkv_ops', cwd=environment.state)
    environment.stamp('vrwkv_ops', key)


def install_project(environment):
    """Install this checkout's own packages in editable mode."""
    present = [name for name in PACKAGES if (ROOT / name / '__init__.py').exists()]
    key = digest([ROOT / 'pyproject.toml'], *environment.identity, *present)
    if environment.stamped('project') == key:
        return
    environment.begin('project')
    say('Installing this checkout')
    environment.install(
        *('--no-build-isolation', '--no-deps', '--reinstall-package', 'vision-rwkv', '-q'),
        *('-e', str(ROOT)),
    )
    for name in present:
        package = Path(name).name
        code = f"import importlib.util as i, sys; i.find_spec('{package}') or sys.exit('not found')"
        if reason := environment.imports(code):
            raise InstallError(f'This checkout was installed but {package} is {reason}')
    environment.stamp('project', key)


def install(environment, purpose):
    """Install everything that `purpose` ('lint', 'demo' or 'test') needs."""
    environment.create()
    if environment.changing.exists():
        environment.repair()
    if purpose != 'demo':
        code = 'import pytest, pytest_timeout, codespell_lib'
        environment.step('test-tools', [REQUIREMENTS / 'test.txt'], code)
    if purpose != 'lint':
        install_base(environment)
        install_mmcv(environment, operators=purpose == 'test')
        code = 'import mmengine, mmpretrain'
        environment.step('classification', [environment.file('classification')], code)
        environment.step('demo', [REQUIREMENTS / 'demo.txt'], 'import sklearn')
        if purpose == 'test':
            code = 'import mmdet, mmseg.models'
            environment.step('dense', [environment.file('dense')], code)
        install_vrwkv_ops(environment)
        install_project(environment)
    environment.changing.unlink(missing_ok=True)


def main():
    """Parse the command line and install."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('purpose', choices=('lint', 'demo', 'test'))
    parser.add_argument('--venv', type=Path, required=True, help='folder of the environment')
    parser.add_argument('--openmmlab', choices=FLAVOURS, default=FLAVOURS[0])
    arguments = parser.parse_args()
    try:
        check_venv_module()
        path = Path(os.path.abspath(arguments.venv))
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f'.{path.name.lstrip(".")}.lock').open('w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f'Waiting for another install into {path}')
                fcntl.flock(lock, fcntl.LOCK_EX)
            install(Environment(path, arguments.openmmlab), arguments.purpose)
    except InstallError as error:
        sys.exit(f'[install] Error: {error}')
    except subprocess.CalledProcessError as error:
        sys.exit(f'[install] Error: {error}')
    except KeyboardInterrupt:
        sys.exit('\n[install] Interrupted: the same make command goes on from here.')


if __name__ == '__main__':
    main()
