"""Compiles the CUDA kernels for the CPU, for machines without a GPU.

cuda_emulator.h takes the place of CUDA's headers, and launches are replaced. Threads, barriers,
shared memory and its limits are those of CUDA; times, warps and races within a phase are not.
"""

import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / 'vrwkv_ops' / 'csrc'
BUILD = HERE.parents[1] / 'build' / 'emulated_cuda'
HEADERS = (
    *('ATen/cuda/CUDAContext.h', 'c10/cuda/CUDAException.h', 'c10/cuda/CUDAFunctions.h'),
    *('c10/cuda/CUDAGuard.h', 'cuda_pipeline.h'),
)
# CUDA fuses multiply-adds, which exponents rely on.
FLAGS = ['-std=c++20', '-O1', '-fPIC', '-w', '-DVRWKV_HAS_FMA=1']


def translate(source: str) -> str:
    """Replaces in the source of kernels what no macro can express."""

    def launch(match: re.Match) -> str:
        name, sizes, arguments = match.groups()
        # Only a variable has one address: it names the kernels that need more shared memory.
        address = f', reinterpret_cast<const void*>({name})' if name == 'kernel' else ''
        return f'emulator::launch({sizes}, [&] {{ {name}({arguments}); }}{address});'

    pattern = r'([\w:]+(?:<[^;<>]*>)?)<<<(.*?)>>>\((.*?)\);'
    source, launches = re.subn(pattern, launch, source, flags=re.DOTALL)
    assert launches and '<<<' not in source
    source = source.replace(
        'extern __shared__ __align__(16) unsigned char memory[];',
        'auto* const memory = emulator::dynamic_memory;',
    )
    careful = r'__device__ __noinline__ (void careful_\w+\(.*?\) \{)'
    source = re.sub(careful, r'\1 ++emulator::careful_calls;', source)
    return '#include "cuda_emulator.h"\n' + source


@functools.cache
def load():
    """The operators of csrc/*/cuda.cu for tensors on the CPU, as torch.ops.vrwkv_emulated.

    They are compiled once for all processes, and again when a source changes.
    """
    files = [Path(__file__), *sorted(HERE.glob('cuda_emulator.*')), *sorted(CSRC.rglob('*.*'))]
    digest = hashlib.sha256(torch.__version__.encode())
    for file in files:
        digest.update(file.read_bytes())
    library = BUILD / f'{digest.hexdigest()[:16]}.so'
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            for old in BUILD.glob('*.so'):
                old.unlink()
            compile_to(library)
    torch.ops.load_library(str(library))
    return torch.ops.vrwkv_emulated


def compile_to(library: Path) -> None:
    """Compiles the kernels into a shared library."""
    folder = BUILD / 'work'
    shutil.rmtree(folder, ignore_errors=True)
    for name in HEADERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "cuda_emulator.h"\n')
    sources = {HERE / 'cuda_emulator.cpp': CSRC}  # each with the folder of its headers
    for source in sorted(CSRC.glob('*/cuda.cu')):
        copy = folder / f'{source.parent.name}.cpp'
        copy.write_text(translate(source.read_text()))
        sources[copy] = source.parent
    compiler = cpp_extension.get_cxx_compiler()
    paths = (folder, HERE, *cpp_extension.include_paths())
    flags = [*FLAGS, *(f'-I{path}' for path in paths)]

    def compile_file(source: Path) -> str:
        target = str(folder / f'{source.stem}.o')
        command = [compiler, *flags, f'-I{sources[source]}', '-c', str(source), '-o', target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, sources))
    libraries = [*(f'-L{path}' for path in cpp_extension.library_paths()), '-ltorch_cpu', '-lc10']
    built = folder / library.name
    subprocess.run([compiler, '-shared', *objects, *libraries, '-o', str(built)], check=True)
    built.replace(library)
