"""Builds vrwkv_ops for this machine's GPU, tests it, measures it and writes a page.

Needs Python >= 3.10, a CUDA build of torch, the CUDA toolkit's nvcc, a C++ compiler, and the Python
packages setuptools, wheel, ninja, numpy and pytest. The environment stays as it is: the build goes
to work_dirs/gpu_check/site, logs and the page beside it. The page is written after each part, so
that a run that was stopped leaves one. Whole models are measured where mmengine is installed. The
exit status is 0 if all parts passed, 1 if one failed and 2 if nothing could be checked.

  python tools/gpu_check.py                 # `make gpu` is the same
  python tools/gpu_check.py --parts tests   # some parts, after a build
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ('setuptools', 'wheel', 'ninja', 'numpy', 'pytest')
# Parts in their order, and the seconds after which each is stopped.
LIMITS = {'build': 300, 'tests': 240, 'operators': 300, 'models': 240, 'sanitizer': 240}
# The repository's settings ask for plug-ins that may be missing here.
PYTEST_INI = (
    '[pytest]\naddopts = --import-mode=importlib --strict-markers -ra\n'
    'markers =\n    cuda: needs an NVIDIA GPU\n    timeout: for pytest-timeout\n'
)
# Each dtype and size compiles Triton kernels anew: one sequence of several tiles (six kernels) and
# one shift (two) are tested here, all others by `pytest -m cuda`.
FEW_COMPILES = (
    'not triton-gpu or (half_types_round_once and 1000 and bfloat16 and not causal)'
    ' or (results_and_gradients and 2x15x10-q_shift)'
)
# Everything is some hundred times slower under compute-sanitizer: a test of each kind.
SANITIZED = (
    'cuda-gpu and (results_and_gradients and (2x197x33 or 1x300x40 or 1x33x80 or 2x15x41)'
    ' or strides_do_not_matter or every_output)'
)
FULL_ELEMENTS, FULL_MEMORY_GIB = 2**25, 38  # what fills a large GPU; what its float64 truth needs


class PartError(Exception):
    """A part failed."""


class Skip(Exception):  # noqa: N818
    """A part cannot run here."""


class Check:
    """The parts of a check: each returns the lines to report.

    Args:
        device: Where to run: ``'cuda'``, or ``'cpu'`` to try the command itself.
        folder: For the build, the logs and the page.
        quick: Whether to take small sizes and few repeats.
    """

    def __init__(self, device: str, folder: Path, quick: bool) -> None:
        self.device, self.folder, self.quick = device, folder, quick
        self.part, self.end = '', 0.0
        paths = [str(folder / 'site'), str(ROOT), os.environ.get('PYTHONPATH', '')]
        self.environment = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join(filter(None, paths)),  # the build before the checkout
            'PYTHONUNBUFFERED': '1',
        }
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str | Path], **environment: str) -> str:
        """Runs a command within the part's limit; its output goes to the terminal and NAME.log."""
        command = list(map(str, command))
        print(f'\n--- {self.part}: {" ".join(command)}', flush=True)
        log = self.folder / f'{name}.log'
        with log.open('w') as file:
            process = subprocess.Popen(
                command,
                env=self.environment | environment,
                cwd=self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(max(1.0, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                code = f'it took longer than {LIMITS[self.part]} s'
        output = log.read_text(errors='replace')
        print(output, flush=True)
        if code:
            why = code if isinstance(code, str) else (output.strip().splitlines() or [''])[-1][:200]
            failed = re.findall(r'^(?:FAILED|ERROR) .{,150}', output, re.MULTILINE)[:20]
            raise PartError('\n'.join([*failed, f'{name} failed: {why}; see {log}']))
        return output

    def build(self) -> list[str]:
        """Compiles vrwkv_ops for the GPUs that are here, into a folder of its own."""
        options = {'VRWKV_OPS_SKIP_CUDA': '1'}
        if self.device == 'cuda':
            import torch

            # Headers that torch wants (cusparse.h) come with its wheels where there is only nvcc.
            packages = Path(torch.__file__).parents[1]
            headers = [*glob.glob(f'{packages}/nvidia/*/include'), os.environ.get('CPATH', '')]
            options = {
                'FORCE_CUDA': '1',
                'TORCH_CUDA_ARCH_LIST': '',  # an image may name more GPUs than this machine has
                'CPATH': os.pathsep.join(headers),
            }
        site, source = self.folder / 'site', self.folder / 'source'
        for old in (site, source):
            shutil.rmtree(old, ignore_errors=True)
        # A copy: the checkout stays as it is, and may be read-only.
        unwanted = shutil.ignore_patterns('build', '*.egg-info', '*.so', '_build_info.json')
        shutil.copytree(ROOT / 'vrwkv_ops', source, ignore=unwanted)
        pip = [sys.executable, '-m', 'pip', 'install', '-v', '--no-build-isolation', '--no-deps']
        self.run('build', [*pip, '--target', site, source], **options)
        output = self.run('backends', [sys.executable, '-m', 'vrwkv_ops'])
        wanted = 'CUDA kernels' if self.device == 'cuda' else 'C++ kernels for the CPU'
        if f'[x] {wanted}' not in output:
            raise PartError(f'{output}there are no {wanted}')
        return output.strip().splitlines()

    def tests(self, chosen: str = FEW_COMPILES, prefix: tuple[str, ...] = (), **environment: str):
        """Runs the tests that are marked cuda."""
        ini = self.folder / 'pytest.ini'
        ini.write_text(PYTEST_INI)
        lines, paths = [], [ROOT / 'tests' / 'ops']
        options = ['-c', ini, f'--rootdir={ROOT}', '-p', 'no:cacheprovider', '-m', 'cuda']
        if self.device == 'cpu':
            options[-1], paths, chosen = 'not cuda', [paths[0] / 'test_token_shift.py'], 'cpu'
        others = [x for x in ROOT.glob('tests/*/test_*.py') if 'mark.cuda' in x.read_text()]
        others = sorted(x for x in others if x.parent != ROOT / 'tests' / 'ops')
        if self.device == 'cuda' and importlib.util.find_spec('mmengine'):
            paths += others
        else:  # tests/conftest.py needs mmengine; the operators' tests do not
            options.append(f'--confcutdir={ROOT / "tests" / "ops"}')
            lines = [f'{x.relative_to(ROOT)}: mmengine is missing' for x in others]
        command = [*prefix, sys.executable, '-m', 'pytest', '-q', *options, '-k', chosen, *paths]
        output = self.run(self.part, command, **environment)
        return [*lines, *re.findall(r'^.*\d+ passed.*$', output, re.MULTILINE)]

    def sanitizer(self) -> list[str]:
        """Runs some tests under compute-sanitizer, which sees accesses out of bounds."""
        home = Path(os.environ.get('CUDA_HOME', '/usr/local/cuda'))
        tool = shutil.which('compute-sanitizer', path=f'{os.environ["PATH"]}:{home}/bin')
        if self.device == 'cpu' or tool is None:
            raise Skip('compute-sanitizer is not installed' if tool is None else 'no GPU')
        # Without PyTorch's cache every tensor has bounds of its own.
        # Failing calls of libraries are not accesses, and PyTorch raises errors for its own.
        prefix = (tool, '--tool', 'memcheck', '--report-api-errors', 'no', '--error-exitcode', '1')
        return self.tests(SANITIZED, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING='1')

    def operators(self) -> list[str]:
        """Times the operators on one image and on enough elements to fill a GPU."""
        small = ['--resolutions', '64', '--channels', '24', '--repeats', '1'] if self.quick else []
        full = ['--elements', '1000', *small] if self.quick else ['--elements', str(FULL_ELEMENTS)]
        full += ['--heads', '0', *([] if self.quick else ['--resolutions', '224', '1024', '2048'])]
        runs, lines = {'operators': small, 'operators_full': full}, []
        if not self.quick and self._memory_gib() < FULL_MEMORY_GIB:
            del runs['operators_full']
            lines.append(f'{FULL_ELEMENTS:,} elements need a GPU of {FULL_MEMORY_GIB} GiB')
        script = ROOT / 'vrwkv_ops' / 'benchmarks' / 'operators.py'
        for name, options in runs.items():
            command = [sys.executable, script, '--device', self.device]
            output = self.run(name, [*command, '--out', self.folder / name, *options])
            lines += [x for x in output.splitlines() if x.startswith(('|', 'a copy reads'))]
        return lines

    def _memory_gib(self) -> float:
        import torch

        if self.device == 'cpu':
            return 0
        return torch.cuda.get_device_properties(0).total_memory / 2**30

    def models(self) -> list[str]:
        """Times whole models."""
        if not importlib.util.find_spec('mmengine'):
            raise Skip('mmengine is not installed')
        sizes = ['--resolutions', '64', '--repeats', '1'] if self.quick else []
        script = ROOT / 'tools' / 'analysis_tools' / 'benchmark_resolution.py'
        options = ['--device', self.device, '--out', self.folder, *sizes]
        output = self.run('models', [sys.executable, script, *options])
        return [line for line in output.splitlines() if line.startswith('|')]


def describe() -> list[str]:
    """GPUs and versions."""
    import torch

    lines = [
        f'Python {platform.python_version()}, torch {torch.__version__}, '
        f'CUDA {torch.version.cuda}, {platform.platform()}'
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        memory = f'{gpu.total_memory / 2**30:.0f} GiB'
        lines.append(f'GPU {index}: {gpu.name}, {memory}, capability {gpu.major}.{gpu.minor}')
    return lines


def find_problem(device: str) -> str:
    """Why nothing can be checked here, or an empty text."""
    if importlib.util.find_spec('torch') is None:
        return 'torch is not installed: install a CUDA build of it (https://pytorch.org)'
    import torch

    if device == 'cuda' and torch.version.cuda is None:
        return f'torch {torch.__version__} is a build without CUDA: install one with CUDA'
    if device == 'cuda' and not torch.cuda.is_available():
        return 'torch sees no NVIDIA GPU: check nvidia-smi and the driver'
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    # Older ones do not know the license field of vrwkv_ops/pyproject.toml.
    if 'setuptools' not in missing and _major('setuptools') < 77:
        missing.append('setuptools>=77,<81')
    if missing:
        names = ' '.join(f"'{name}'" for name in missing)
        return f'packages are missing: {sys.executable} -m pip install {names}'
    return ''


def _major(package: str) -> int:
    return int(importlib.metadata.version(package).split('.')[0])


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--parts', nargs='+', choices=LIMITS, default=LIMITS, help='default: all')
    parser.add_argument('--folder', type=Path, default=ROOT / 'work_dirs' / 'gpu_check')
    parser.add_argument('--quick', action='store_true', help='benchmarks of small sizes only')
    help_text = 'cpu: try this command itself, with a few tests'
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help=help_text)
    args = parser.parse_args(argv)
    problem = find_problem(args.device)
    if problem:
        print(f'Nothing was checked: {problem}', file=sys.stderr)
        return 2
    check = Check(args.device, args.folder.resolve(), args.quick)
    parts, states, text = [name for name in LIMITS if name in args.parts], {}, ''
    for part in parts:
        check.part, start = part, time.monotonic()
        check.end = start + LIMITS[part]
        try:
            if states.get('build') == 'FAIL':
                raise Skip('there is no build')
            states[part], lines = 'PASS', getattr(check, part)()
        except Skip as reason:
            states[part], lines = 'SKIPPED', [str(reason)]
        except PartError as reason:
            states[part], lines = 'FAIL', str(reason).splitlines()
        text += f'## {states[part]} {part} ({time.monotonic() - start:.0f} s)\n\n'
        text += ''.join(f'    {line}\n' for line in lines) + '\n'
        verdict = 'FAIL' if 'FAIL' in states.values() else 'PASS'
        verdict += '' if part == parts[-1] else ' so far'
        facts = '\n'.join(describe())
        page = f'# GPU check: {verdict}\n\n{facts}\n\n{text}Logs: {check.folder}\n'
        (check.folder / 'summary.md').write_text(page)
    print('\n' + page)
    return int('FAIL' in states.values())


if __name__ == '__main__':
    sys.exit(main())
