"""Checks vrwkv_ops on this machine's GPU: builds it, tests it, measures it, sums it up on a page.

Needs Python >= 3.10, a CUDA build of torch, the CUDA toolkit's nvcc and a C++ compiler. What else
is missing (setuptools, ninja, pytest, numpy) is installed with pip into a folder of its own.
Nothing is changed in the environment: the build goes to work_dirs/gpu_check/site, logs and the
summary beside it. Whole models are measured where mmengine is installed. Exits with 0 if all
parts passed.

  python tools/gpu_check.py                 # `make gpu` is the same
  python tools/gpu_check.py --parts tests   # some parts, after a build
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('build', 'tests', 'sanitizer', 'operators', 'models')
# setuptools below 77 does not know the license field of vrwkv_ops/pyproject.toml.
BUILD_NEEDS = {'setuptools': 'setuptools>=77,<81', 'wheel': 'wheel', 'ninja': 'ninja'}
TEST_NEEDS = {'pytest': 'pytest>=8', 'numpy': 'numpy'}
# The repository's settings ask for plug-ins that need not be here.
PYTEST_INI = (
    '[pytest]\naddopts = --import-mode=importlib --strict-markers -ra\n'
    'markers =\n    cuda: needs an NVIDIA GPU\n    timeout: for pytest-timeout\n'
)
# What fills a large GPU, and what the float64 reference of it needs.
FULL_ELEMENTS, FULL_MEMORY_GIB = 2**25, 38
# Everything is some hundred times slower under compute-sanitizer: a test of each kind.
SANITIZED = 'test_odd_sizes and float16 or test_strides_do_not_matter or test_every_output'


@dataclass
class Result:
    """How a part went.

    Attributes:
        part: Its name.
        state: ``'PASS'``, ``'FAIL'`` or ``'SKIPPED'``.
        seconds: How long it took.
        lines: What to say of it.
    """

    part: str
    state: str = 'PASS'
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


class Check:
    """The parts, and what they share.

    Args:
        device: Where to run: ``'cuda'``, or ``'cpu'`` to try the command itself.
        folder: For the build, logs and the summary.
        quick: Whether to take small sizes and few repeats.
    """

    def __init__(self, device: str, folder: Path, quick: bool) -> None:
        self.device, self.folder, self.quick = device, folder, quick
        self.site, self.helpers = folder / 'site', folder / 'helpers'
        folder.mkdir(parents=True, exist_ok=True)

    # --- Processes ----------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Environment of a process that sees the build, before whatever else is installed."""
        paths = [str(self.site), str(self.helpers), os.environ.get('PYTHONPATH', '')]
        return {
            **os.environ,
            'PYTHONPATH': os.pathsep.join(path for path in paths if path),
            'PYTHONUNBUFFERED': '1',
        }

    def run(self, part: str, command: list[str], **environment: str) -> tuple[int, str]:
        """Runs a command; its output goes to the terminal, PART.log and the caller."""
        print(f'\n--- {part}: {" ".join(command)}', flush=True)
        lines = []
        with (self.folder / f'{part}.log').open('w') as log:
            process = subprocess.Popen(
                command,
                env=self.environment() | environment,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            for line in process.stdout:
                sys.stdout.write(line)
                log.write(line)
                lines.append(line)
        return process.wait(), ''.join(lines)

    def need(self, requirements: dict[str, str]) -> str:
        """Installs what cannot be imported; returns why that failed, or an empty text."""
        missing = [text for name, text in requirements.items() if not self._has(name)]
        if not missing:
            return ''
        code, output = self.run(
            'helpers',
            [sys.executable, '-m', 'pip', 'install', '--target', str(self.helpers), *missing],
        )
        return f'cannot install {", ".join(missing)}: {_last_line(output)}' if code else ''

    def _has(self, name: str) -> bool:
        if name == 'setuptools':
            try:
                return int(importlib.metadata.version(name).split('.')[0]) >= 77
            except importlib.metadata.PackageNotFoundError:
                return False
        return importlib.util.find_spec(name) is not None or (self.helpers / name).is_dir()

    # --- Parts --------------------------------------------------------------------------------

    def build(self) -> Result:
        """Compiles vrwkv_ops for the GPU that is here, into a folder of its own."""
        result = Result('build')
        problem = self.need(BUILD_NEEDS)
        if problem:
            return _fail(result, problem)
        options = {'VRWKV_OPS_SKIP_CUDA': '1'}
        if self.device == 'cuda':
            import torch

            count = torch.cuda.device_count()
            archs = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
            # Headers that torch wants (cusparse.h) come with its wheels where there is only nvcc.
            headers = [
                folder
                for path in (sys.prefix, str(Path(torch.__file__).parents[1]))
                for pattern in (
                    f'{path}/nvidia/*/include',
                    f'{path}/lib/python3*/*/nvidia/*/include',
                )
                for folder in glob.glob(pattern)
            ]
            options = {
                'FORCE_CUDA': '1',
                'TORCH_CUDA_ARCH_LIST': ';'.join(f'{major}.{minor}' for major, minor in archs),
                'CPATH': os.pathsep.join([*dict.fromkeys(headers), os.environ.get('CPATH', '')]),
            }
        shutil.rmtree(self.site, ignore_errors=True)
        # A copy: the checkout stays as it is, and may be read-only.
        source = self.folder / 'source'
        shutil.rmtree(source, ignore_errors=True)
        unwanted = shutil.ignore_patterns('build', '*.egg-info', '*.so', '_build_info.json')
        shutil.copytree(ROOT / 'vrwkv_ops', source, ignore=unwanted)
        install = ['pip', 'install', '-v', '--no-build-isolation', '--no-deps', '--target']
        code, output = self.run(
            'build', [sys.executable, '-m', *install, str(self.site), str(source)], **options
        )
        if code:
            return _fail(result, f'pip failed: {_last_line(output)}; see {self.folder}/build.log')
        code, output = self.run('backends', [sys.executable, '-m', 'vrwkv_ops'])
        result.lines += output.strip().splitlines()
        wanted = 'CUDA kernels' if self.device == 'cuda' else 'C++ kernels for the CPU'
        if code or f'[x] {wanted}' not in output:
            return _fail(result, f'there are no {wanted}')
        return result

    def tests(self) -> Result:
        """Runs every test that is marked cuda."""
        result = Result('tests')
        problem = self.need(TEST_NEEDS)
        if problem:
            return _fail(result, problem)
        return self._pytest(result, [], 'cuda' if self.device == 'cuda' else 'not cuda')

    def _pytest(self, result: Result, prefix: list[str], marked: str, chosen: str = '') -> Result:
        ini = self.folder / 'pytest.ini'
        ini.write_text(PYTEST_INI)
        # Other files may import what is not installed here.
        found = sorted((ROOT / 'tests').glob('*/test_*.py'))
        found = [path for path in found if 'mark.cuda' in path.read_text()]
        paths = [path for path in found if path.parent.name == 'ops']
        others = [path for path in found if path not in paths]
        if self.device == 'cpu':
            paths, others = [ROOT / 'tests' / 'ops' / 'test_q_shift.py'], []
        options = ['-c', str(ini), f'--rootdir={ROOT}', '-p', 'no:cacheprovider', '-m', marked]
        if others and importlib.util.find_spec('mmengine'):
            paths += others
        else:
            # tests/conftest.py needs mmengine; the operators' tests do not.
            options.append(f'--confcutdir={ROOT / "tests" / "ops"}')
            result.lines += [f'{path.relative_to(ROOT)}: mmengine is missing' for path in others]
        if chosen:
            options += ['-k', chosen]
        command = [*prefix, sys.executable, '-m', 'pytest', '-q', *options, *map(str, paths)]
        code, output = self.run(result.part, command)
        summary = [line for line in output.splitlines() if re.search(r'\d+ (passed|failed)', line)]
        failed = [line for line in output.splitlines() if line.startswith(('FAILED', 'ERROR'))]
        result.lines += [*summary[-1:], *(line[:160] for line in failed[:20])]
        if code or not summary:
            return _fail(result, f'see {self.folder}/{result.part}.log')
        return result

    def sanitizer(self) -> Result:
        """Runs some tests under compute-sanitizer, which sees accesses out of bounds."""
        result = Result('sanitizer')
        tool = shutil.which('compute-sanitizer')
        for home in (os.environ.get('CUDA_HOME'), '/usr/local/cuda'):
            candidate = Path(home or '/nowhere', 'bin', 'compute-sanitizer')
            tool = tool or (str(candidate) if candidate.is_file() else None)
        if self.device == 'cpu' or tool is None:
            result.state = 'SKIPPED'
            result.lines.append('compute-sanitizer is not installed' if tool is None else 'no GPU')
            return result
        problem = self.need(TEST_NEEDS)
        if problem:
            return _fail(result, problem)
        # Without PyTorch's cache every tensor has bounds of its own.
        os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] = '1'
        try:
            prefix = [tool, '--tool', 'memcheck', '--error-exitcode', '1']
            return self._pytest(result, prefix, 'cuda', SANITIZED)
        finally:
            del os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']

    def operators(self) -> Result:
        """Times the operators on one image and on what fills a GPU; each is checked first."""
        result = Result('operators')
        sizes = ['--resolutions', '64', '--channels', '24', '--repeats', '1'] if self.quick else []
        full = ['--elements', '1000' if self.quick else str(FULL_ELEMENTS), '--heads', '0']
        if not self.quick:
            full += ['--resolutions', '224', '1024', '2048']
        runs = {'operators': sizes, 'operators_full': [*sizes, *full]}
        if self.memory_gib() < FULL_MEMORY_GIB and not self.quick:
            del runs['operators_full']
            result.lines.append(
                f'{FULL_ELEMENTS:,} elements: not measured, a float64 reference of them takes a '
                f'GPU of {FULL_MEMORY_GIB} GiB'
            )
        script = ROOT / 'vrwkv_ops' / 'benchmarks' / 'operators.py'
        for name, options in runs.items():
            folder = self.folder / name
            command = [sys.executable, str(script), '--device', self.device, '--out', str(folder)]
            code, output = self.run(name, [*command, *options])
            if code:
                return _fail(result, _last_line(output))
            content = json.loads((folder / 'operators.json').read_text())
            bandwidth = content['copy_bytes_per_second']
            result.lines.append(f'a copy reads and writes {bandwidth / 1e9:.0f} GB/s')
            largest = max(row['resolution'] for row in content['rows'])
            for row in content['rows']:
                # A page has room for the largest images, and for all of them of what matters most.
                matters = row['resolution'] == largest or row['kernel'] == 'bi_wkv'
                if row['error'] is not None and matters:
                    share = row['bytes'] / row['seconds'] / bandwidth
                    result.lines.append(
                        f'{row["kernel"]}, {row["dtype"]}, {row["direction"]}, '
                        f'{row["batch"]} x {row["resolution"]} pixels: '
                        f'{row["seconds"] * 1e3:.3f} ms, {share:.0%} of the copy bandwidth'
                    )
        return result

    def memory_gib(self) -> float:
        """Of the GPU; 0 without one."""
        import torch

        if self.device == 'cpu':
            return 0
        return torch.cuda.get_device_properties(0).total_memory / 2**30

    def models(self) -> Result:
        """Times whole models, where mmengine is installed."""
        result = Result('models')
        if not importlib.util.find_spec('mmengine'):
            result.state = 'SKIPPED'
            result.lines.append('mmengine is not installed')
            return result
        sizes = ['--resolutions', '64', '--repeats', '1'] if self.quick else []
        script = ROOT / 'tools' / 'analysis_tools' / 'benchmark_resolution.py'
        options = ['--device', self.device, '--out', str(self.folder)]
        command = [sys.executable, str(script), *options, *sizes]
        paths = os.pathsep.join([str(ROOT), self.environment()['PYTHONPATH']])
        code, output = self.run('models', command, PYTHONPATH=paths)
        result.lines += [line for line in output.splitlines() if line.startswith('|')]
        return _fail(result, _last_line(output)) if code else result


def _fail(result: Result, why: str) -> Result:
    result.state = 'FAIL'
    result.lines.append(why)
    return result


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ['no output'])[-1][:200]


def describe() -> list[str]:
    """GPU and versions."""
    import torch

    lines = [
        f'Python {platform.python_version()}, torch {torch.__version__}, '
        f'CUDA {torch.version.cuda}, {platform.system()} {platform.release()} {platform.machine()}'
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(
            f'GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability '
            f'{gpu.major}.{gpu.minor}'
        )
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
    return ''


def summarise(results: list[Result], folder: Path) -> str:
    """The page."""
    passed = all(result.state != 'FAIL' for result in results)
    lines = [f'# GPU check: {"PASS" if passed else "FAIL"}', '', *describe(), '']
    for result in results:
        lines.append(f'## {result.state} {result.part} ({result.seconds:.0f} s)')
        lines += ['', *(f'    {line}' for line in result.lines), '']
    return '\n'.join([*lines, f'Logs and figures: {folder}', ''])


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--parts', nargs='+', choices=PARTS, default=PARTS, help='default: all of them'
    )
    parser.add_argument('--folder', type=Path, default=ROOT / 'work_dirs' / 'gpu_check')
    parser.add_argument('--quick', action='store_true', help='benchmarks of small sizes only')
    parser.add_argument(
        '--device',
        choices=('cuda', 'cpu'),
        default='cuda',
        help='cpu: try this command itself, with a few tests',
    )
    args = parser.parse_args(argv)
    problem = find_problem(args.device)
    if problem:
        print(f'Nothing was checked: {problem}', file=sys.stderr)
        return 2
    check = Check(args.device, args.folder.resolve(), args.quick)
    results = []
    for part in PARTS:
        if part not in args.parts:
            continue
        start = time.perf_counter()
        result = getattr(check, part)()
        result.seconds = time.perf_counter() - start
        results.append(result)
        if part == 'build' and result.state == 'FAIL':
            results += [
                Result(name, 'SKIPPED', lines=['there is no build'])
                for name in PARTS[1:]
                if name in args.parts
            ]
            break
    page = summarise(results, check.folder)
    (check.folder / 'summary.md').write_text(page)
    print('\n' + page)
    return 0 if all(result.state != 'FAIL' for result in results) else 1


if __name__ == '__main__':
    sys.exit(main())
