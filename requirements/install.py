"""Install what the make targets need into a virtual environment of their own.

The Makefile runs this script, with the standard library only: nothing is installed yet. Every run
hands pinned requirement files to ``uv pip install``, which does nothing where they are satisfied.
An environment whose last run did not finish is made anew; uv's cache makes that quick.
"""

import argparse
import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
# Requirement files of each purpose; those of the OpenMMLab flavour lie in its own folder.
PURPOSES = {
    'lint': ('test',),
    'demo': ('base', 'demo', 'classification'),
    'dense': ('base', 'demo', 'classification', 'dense'),
    'test': ('base', 'demo', 'classification', 'dense', 'deployment', 'test'),
}
MMCV = {'mmcv', 'mmcv_lite', 'onedl_mmcv'}  # they install the same folder
DISK_GIB = 10  # torch for CUDA unpacks to 5 GB; the rest is downloads and compiled files
HEARTBEAT_SECONDS = 20


class InstallError(Exception):
    """An error whose message tells the user what to do."""


def say(message):
    """Print one line of progress at once, also into a pipe."""
    print(f'[install] {message}', flush=True)


def check_machine():
    """Refuse a machine that torch has no packages for, and a Python without venv."""
    if sys.platform != 'linux' or sys.maxsize < 2**32:
        bits = 64 if sys.maxsize > 2**32 else 32
        raise InstallError(
            f'make installs on 64-bit Linux, and this is a {bits}-bit Python on {sys.platform}. '
            'Install torch yourself, then type: VRWKV_OPS_SKIP_BUILD=1 pip install ./vrwkv_ops '
            "&& pip install -e '.[classification]'"
        )
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


def check_compiler(python_headers=False):
    """Refuse to compile without a C++17 compiler and, where they are needed, Python's headers."""
    names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    command = next((shlex.split(name) for name in names if shutil.which(name.split()[0])), None)
    if command is None:
        raise InstallError(
            f'No C++ compiler was found ({", ".join(names)}). On Debian and Ubuntu: apt install '
            'g++; on Fedora: dnf install gcc-c++; or set CXX. To go on without compiled kernels, '
            'in slower pure PyTorch: VRWKV_OPS_SKIP_BUILD=1 make demo'
        )
    include = sysconfig.get_path('include')
    probes = {'optional': f'{command[0]} cannot compile C++17. Install g++ 9 or newer, or set CXX.'}
    if python_headers:
        probes['Python.h'] = (
            f"Python's headers are not in {include}. On Debian and Ubuntu: apt install "
            'python3-dev; on Fedora: dnf install python3-devel.'
        )
    for header, advice in probes.items():
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, 'probe.cpp')
            source.write_text(f'#include <{header}>\nint main() {{ return 0; }}\n')
            line = [*command, '-std=c++17', '-fsyntax-only', f'-I{include}', str(source)]
            if subprocess.run(line, capture_output=True).returncode:
                raise InstallError(advice)


def default_jobs():
    """Compile jobs that fit the cores and the memory (torch's headers take 1 GB a job)."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 1.5)))


def build_key():
    """Name the facts that decide a build, for uv's cache, which compares settings only."""
    [torch] = re.findall(r'^torch==\S+', (REQUIREMENTS / 'base.txt').read_text(), re.MULTILINE)
    facts = [torch, shutil.which('nvcc'), os.path.exists('/dev/nvidiactl') and 'gpu']
    facts += [os.environ.get(name) for name in ('CXX', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')]
    return ' '.join(str(fact) for fact in facts if fact)


class Environment:
    """A virtual environment that this script made, and the commands that change it.

    Attributes:
        complete: The file that says which Python and flavour the environment is for; it is there
            unless a run is changing the environment or was interrupted while it did.
    """

    def __init__(self, path, flavour):
        self.path = path
        self.flavour = flavour
        self.python = path / 'bin' / 'python'
        self.state = path / '.install'
        self.complete = self.state / 'complete'
        places = {'base': str(path), 'platbase': str(path)}
        self.site = Path(sysconfig.get_path('purelib', 'posix_prefix', vars=places))

    def open(self):
        """Make the environment, or make it anew unless its last run finished."""
        identity = f'{sys.version}\n{self.path}\n{self.flavour}\n'
        if not (self.complete.is_file() and self.complete.read_text() == identity):
            self.clear()
            check_disk(self.path)
            say(f'Making {self.path} with Python {platform.python_version()}')
            self.state.mkdir(parents=True)
            self.call('-m', 'venv', str(self.path), python=sys.executable)
            self.call(
                *('-m', 'pip', 'install', '-q', '--disable-pip-version-check'),
                *('-r', str(REQUIREMENTS / 'bootstrap.txt')),
            )
        self.complete.unlink(missing_ok=True)
        return identity

    def clear(self):
        """Remove an environment of this script that is incomplete or of another Python."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.state.is_dir():
            raise InstallError(
                f'make did not make {self.path}: move it away, or choose another folder: '
                'make demo VENV=/path/to/venv'
            )
        say(f'Removing {self.path}: its last install did not finish, or was of another kind')
        shutil.rmtree(self.path)

    def call(self, *arguments, python=None, log=None):
        """Run a Python command; with `log`, write its output there and show the progress.

        Raises:
            InstallError: If the command fails.
        """
        line = [str(python or self.python), *arguments]
        # The build backends of packages that are built without isolation find ninja on PATH.
        environment = dict(os.environ, PATH=f'{self.path / "bin"}:{os.environ.get("PATH", "")}')
        environment.setdefault('MAX_JOBS', str(default_jobs()))
        environment.setdefault('UV_LOCK_TIMEOUT', '7200')  # seconds, for another build of the same
        if log is None:
            failed = subprocess.run(line, env=environment, cwd=ROOT).returncode
        else:
            failed = self.watch(line, environment, self.state / log)
        if failed:
            raise InstallError(
                f'`{shlex.join(arguments[1:3])}` failed, see above. If it reached no package '
                'registry: check the network and the settings of pip and uv (HTTPS_PROXY, '
                'PIP_INDEX_URL, UV_DEFAULT_INDEX). Then type the same make command again.'
            )

    def watch(self, line, environment, log):
        """Run a command that may compile for long; return its exit status."""
        start = time.monotonic()
        with log.open('w') as file:
            process = subprocess.Popen(
                line, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )
        while process.poll() is None:
            try:
                process.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                counts = re.findall(r'\[(\d+)/(\d+)\] ', log.read_text(errors='replace'))
                count = '{} of {} files'.format(*counts[-1]) if counts else 'preparing'
                seconds = int(time.monotonic() - start)
                say(f'Building ({log.stem}): {count}, {seconds} s. Everything is in {log}')
        if process.returncode:
            print(''.join(log.read_text(errors='replace').splitlines(keepends=True)[-40:]))
        return process.returncode

    def uv(self, command, *arguments, log=None):
        """Run `uv pip COMMAND` on this environment."""
        verbose = ['--verbose'] if log else []
        line = ('-m', 'uv', 'pip', command, '--python', str(self.python), *verbose)
        self.call(*line, *arguments, log=log)

    def requirements(self, option, *names):
        """Return uv's options for requirement files, shared or of this flavour."""
        shared = {name: REQUIREMENTS / f'{name}.txt' for name in names}
        files = [
            file if file.exists() else REQUIREMENTS / self.flavour / file.name
            for file in shared.values()
        ]
        return [text for file in files for text in (option, str(file))]

    def install(self, *arguments, log=None):
        """Run `uv pip install` under all pins, so that no step moves a package of another."""
        pins = self.requirements('--constraints', *PURPOSES['test'])
        excludes = self.requirements('--excludes', 'excludes')
        self.uv('install', *pins, *excludes, *arguments, log=log)

    def mmcv(self):
        """Return the installed distributions of mmcv, and whether its operators are compiled."""
        names = {path.name.partition('-')[0] for path in self.site.glob('*mmcv*.dist-info')}
        return names & MMCV, any(self.site.glob('mmcv/_ext.*'))

    def install_mmcv(self, compiled):
        """Replace mmcv by the build with compiled operators, or by the one without."""
        name = 'mmcv' if compiled else 'mmcv-lite'
        package = 'onedl-mmcv' if self.flavour == 'onedl' else name
        wanted = package.replace('-', '_')
        if self.mmcv() == ({wanted}, compiled):
            return
        if compiled:
            check_compiler(python_headers=True)
        self.uv('uninstall', '-q', *sorted(found.replace('_', '-') for found in MMCV))
        shutil.rmtree(self.site / 'mmcv', ignore_errors=True)
        key = build_key() if compiled else 'without operators'
        options = [
            *self.requirements('-r', name),
            *('--config-settings-package', f'{package}:key={key}'),
        ]
        if not compiled:
            self.install(*options)
            return
        say('Compiling mmcv takes 10 to 20 minutes on two cores, once')
        self.uv('install', *self.requirements('-r', 'mmcv-build'))
        self.install(*options, '--no-build-isolation-package', package, log='mmcv.log')
        self.install(*self.requirements('-r', 'base'))  # the setuptools of before
        self.call('-c', 'import mmcv.ops')

    def install_checkout(self):
        """Compile vrwkv_ops, and install it and this checkout, both editable."""
        self.install(
            *('--no-build-isolation', '--no-deps', *self.requirements('-r', 'checkout')),
            *('--config-settings-package', f'vrwkv-ops:key={build_key()}'),
            log='vrwkv_ops.log',
        )


def install(environment, purpose):
    """Install everything that `purpose` needs."""
    kernels = purpose != 'lint' and not os.environ.get('VRWKV_OPS_SKIP_BUILD')
    if kernels and not any(environment.site.glob('vrwkv_ops-*')):
        check_compiler()
    identity = environment.open()
    files = PURPOSES['dense' if purpose.startswith('mmcv') else purpose]
    environment.install(*environment.requirements('-r', *files))
    if purpose != 'lint':
        found, compiled = environment.mmcv()
        compiled = compiled and len(found) == 1  # two at once: some files are of the other one
        environment.install_mmcv({'mmcv': True, 'mmcv-lite': False}.get(purpose, compiled))
        environment.install_checkout()
    environment.complete.write_text(identity)


def main():
    """Parse the command line and install."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('purpose', choices=(*PURPOSES, 'mmcv', 'mmcv-lite'))
    parser.add_argument('--venv', type=Path, required=True, help='folder of the environment')
    parser.add_argument('--openmmlab', choices=('openmmlab', 'onedl'), default='openmmlab')
    arguments = parser.parse_args()
    try:
        check_machine()
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
    except KeyboardInterrupt:
        sys.exit('\n[install] Interrupted: the same make command makes the environment anew.')


if __name__ == '__main__':
    main()
