"""The build of the kernels, their loading, and the reports of ``python -m vrwkv_ops``."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setuptools.errors import SetupError

from vrwkv_ops import backends

from .backends import HIDE_KERNELS

_PACKAGE = Path(__file__).resolve().parents[2] / 'vrwkv_ops'
_spec = importlib.util.spec_from_file_location('kernels', _PACKAGE / 'build_tools' / 'kernels.py')
kernels = sys.modules['kernels'] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernels)

# A machine where all is there, and what to take away from it.
GPU_MACHINE = kernels.Machine(
    torch='2.8.0+cu128',
    torch_cuda='12.8',
    cuda_home='/usr/local/cuda',
    nvcc_archs=('7.5', '8.0', '9.0', '10.0', '12.0'),
    gpu_archs=('9.0',),
)
NO_GPU = replace(GPU_MACHINE, gpu_archs=())


@pytest.mark.parametrize(
    ('env', 'machine', 'archs'),
    [
        ({}, GPU_MACHINE, '9.0+PTX'),
        ({}, replace(GPU_MACHINE, gpu_archs=('8.0', '9.0')), '8.0;9.0+PTX'),
        ({'TORCH_CUDA_ARCH_LIST': '8.6+PTX'}, GPU_MACHINE, '8.6+PTX'),
        ({'FORCE_CUDA': '1'}, NO_GPU, '8.0;9.0;12.0+PTX'),
        ({'FORCE_CUDA': '1'}, GPU_MACHINE, '9.0+PTX'),
        ({'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '8.0'}, NO_GPU, '8.0'),
        ({'FORCE_CUDA': '1'}, replace(NO_GPU, nvcc_archs=('8.0', '9.0')), '8.0;9.0+PTX'),
        ({'FORCE_CUDA': '1'}, replace(NO_GPU, torch='2.4.1+cu124'), '8.0;9.0+PTX'),
        ({'FORCE_CUDA': '1', 'VRWKV_OPS_SKIP_CUDA': '0'}, NO_GPU, '8.0;9.0;12.0+PTX'),
    ],
)
def test_builds_cuda_for(env, machine, archs):
    parts = kernels.plan(env, machine)
    assert parts['cpu'].built and parts['cuda'].built
    assert parts['cuda'].archs == archs


@pytest.mark.parametrize(
    ('env', 'machine', 'why', 'fix'),
    [
        ({}, NO_GPU, 'no GPU', 'FORCE_CUDA=1'),
        ({'FORCE_CUDA': '0'}, NO_GPU, 'no GPU', 'FORCE_CUDA=1'),
        ({'TORCH_CUDA_ARCH_LIST': '8.0'}, NO_GPU, 'no GPU', 'FORCE_CUDA=1'),
        ({}, replace(GPU_MACHINE, cuda_home=None), 'no nvcc', 'CUDA toolkit 12.8'),
        ({}, replace(GPU_MACHINE, nvcc_cuda='13.0'), 'nvcc is of CUDA 13.0', 'CUDA toolkit 12.8'),
        ({}, replace(GPU_MACHINE, torch_cuda=None), 'without CUDA', 'CUDA build of torch'),
        ({'VRWKV_OPS_SKIP_CUDA': '1'}, GPU_MACHINE, 'VRWKV_OPS_SKIP_CUDA', 'Unset'),
    ],
)
def test_builds_for_the_cpu_alone(env, machine, why, fix):
    parts = kernels.plan(env, machine)
    assert parts['cpu'].built and not parts['cuda'].built
    assert why in parts['cuda'].why and fix in parts['cuda'].fix


def test_builds_nothing_when_asked_by_name():
    for part in kernels.plan({'VRWKV_OPS_SKIP_BUILD': '1'}, GPU_MACHINE).values():
        assert not part.built and 'VRWKV_OPS_SKIP_BUILD' in part.why and 'Unset' in part.fix


@pytest.mark.parametrize(
    ('machine', 'why', 'fix'),
    [
        (kernels.Machine(torch_problem='No module'), 'No module', '--no-build-isolation'),
        (
            replace(GPU_MACHINE, torch='2.3.1+cu121'),
            'too old',
            "pip install --upgrade 'torch>=2.4'",
        ),
        (replace(GPU_MACHINE, cxx_problem='no C++ compiler'), r'no C\+\+', 'apt-get install g'),
        (kernels.Machine(platform_problem='Linux only'), 'Linux only', 'VRWKV_OPS_SKIP_BUILD=1'),
    ],
)
def test_fails_without_cpu_kernels(machine, why, fix):
    """One line that says why and what to type; leaving the kernels out must be asked for."""
    with pytest.raises(SetupError, match=f'{why}.*{fix}') as error:
        kernels.plan({}, machine)
    assert '\n' not in str(error.value)
    assert not kernels.plan({'VRWKV_OPS_SKIP_BUILD': '1'}, machine)['cpu'].built


@pytest.mark.parametrize(
    ('system', 'maxsize', 'problem'),
    [
        ('linux', 2**63 - 1, ''),
        ('linux', 2**31 - 1, '64-bit Python'),
        ('darwin', 2**63 - 1, 'Linux only'),
        ('win32', 2**63 - 1, 'Linux only'),
    ],
)
def test_platforms(system, maxsize, problem):
    found = kernels._platform_problem(system, 'x86_64', maxsize)
    assert problem in found if problem else not found


@pytest.mark.parametrize(
    ('env', 'machine', 'message'),
    [
        ({}, replace(GPU_MACHINE, cuda_home=None), 'no nvcc'),
        ({}, replace(GPU_MACHINE, torch_cuda=None), 'without CUDA'),
        ({}, replace(GPU_MACHINE, cxx_problem='no C++ compiler'), r'no C\+\+ compiler'),
        ({}, kernels.Machine(torch_problem='No module'), 'No module'),
        ({'VRWKV_OPS_SKIP_CUDA': '1'}, GPU_MACHINE, 'contradict'),
        ({'VRWKV_OPS_SKIP_BUILD': '1'}, GPU_MACHINE, 'contradict'),
    ],
)
def test_force_cuda_fails_where_it_cannot_be_had(env, machine, message):
    with pytest.raises(SetupError, match=message):
        kernels.plan({'FORCE_CUDA': '1', **env}, machine)


@pytest.mark.parametrize(
    ('compiler', 'problem'),
    [(['c++'], ''), (['/bin/false'], 'does not work'), (['/no/such/c++'], 'no C++ compiler')],
)
def test_compiler_probe(compiler, problem):
    found = kernels._cxx_problem(compiler)
    assert problem in found if problem else not found


def test_failed_compilation_fails_the_install(tmp_path):
    """``build_ext`` itself, with a compiler that passes the probe and fails on the sources."""
    compiler = tmp_path / 'c++'
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *probe.cpp*) exec c++ "$@";; esac\necho "no such type"\nexit 1\n'
    )
    compiler.chmod(0o755)
    build = [sys.executable, 'setup.py', 'build_ext', '-b', tmp_path / 'lib', '-t', tmp_path / 'o']
    env = {**_environment(), 'CXX': str(compiler), 'VRWKV_OPS_SKIP_CUDA': '1', 'MAX_JOBS': '1'}
    result = subprocess.run(build, cwd=_PACKAGE, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert 'no such type' in result.stderr and 'Traceback' not in result.stderr
    assert result.stderr.splitlines()[-1].endswith('VRWKV_OPS_SKIP_BUILD=1 pip install ./vrwkv_ops')
    assert not (tmp_path / 'lib' / 'vrwkv_ops' / '_build_info.json').exists()


def test_package_without_kernels(tmp_path):
    """A wheel built without kernels, by name: its tag, what is in it, and its record."""
    source = tmp_path / 'source'
    unwanted = shutil.ignore_patterns('build', '*.egg-info', '*.so', '_build_info.json')
    shutil.copytree(_PACKAGE, source, ignore=unwanted)
    build = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path]
    env = {**_environment(), 'VRWKV_OPS_SKIP_BUILD': '1'}
    result = subprocess.run(build, cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob('*.whl')
    assert re.fullmatch(r'vrwkv_ops-[\d.]+-py3-none-linux_\w+\.whl', wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = json.loads(archive.read('vrwkv_ops/_build_info.json'))
        (metadata,) = (archive.read(name) for name in names if name.endswith('/METADATA'))
        (licence,) = (archive.read(name) for name in names if name.endswith('/LICENSE'))
    assert not info['cpu']['built'] and 'VRWKV_OPS_SKIP_BUILD' in info['cpu']['why']
    assert 'vrwkv_ops/triton/bi_wkv.py' in names
    assert licence == (_PACKAGE.parent / 'LICENSE').read_bytes()
    assert b'License-Expression: Apache-2.0' in metadata
    assert b'](../' not in metadata  # the README is read alone


def test_source_archive_builds_kernels(tmp_path):
    """All that the build reads is in the source archive."""
    source = tmp_path / 'source'
    unwanted = shutil.ignore_patterns('build', '*.egg-info', '*.so', '_build_info.json')
    shutil.copytree(_PACKAGE, source, ignore=unwanted)
    build = [sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(archive) as file:
        names = {name.partition('/')[2] for name in file.getnames()}
    read = ['csrc/**/*.h', 'csrc/**/*.cpp', 'csrc/**/*.cu', 'build_tools/*.py', 'src/**/*.py']
    wanted = {p.relative_to(source).as_posix() for pattern in read for p in source.glob(pattern)}
    assert len(wanted) > 40
    assert wanted | {'LICENSE', 'README.md', 'pyproject.toml', 'setup.py'} <= names


def _environment():
    unset = (
        'FORCE_CUDA',
        'TORCH_CUDA_ARCH_LIST',
        'VRWKV_OPS_SKIP_BUILD',
        'VRWKV_OPS_SKIP_CUDA',
        'UV',
    )
    return {name: value for name, value in os.environ.items() if name not in unset}


# --- Loading and the diagnosis ----------------------------------------------------------------


@pytest.fixture
def fresh_backends(monkeypatch):
    """Nothing loaded and nothing warned of yet."""
    monkeypatch.setattr(backends, '_loaded', {})
    monkeypatch.setattr(backends, '_warned', set())
    return backends


def _write_info(monkeypatch, folder, **changes):
    built = dict(built=True, why='', fix='', archs='', file='_C.so')
    absent = dict(built=False, why='no nvcc was found', fix='Install it', archs='', file='')
    info = dict(torch=torch.__version__, torch_cuda=torch.version.cuda, cpu=built, cuda=absent)
    info.update(changes)
    path = folder / '_build_info.json'
    path.write_text(json.dumps(info))
    monkeypatch.setattr(backends, '_PACKAGE', folder)
    monkeypatch.setattr(backends, '_BUILD_INFO', path)


def test_kernels_of_this_environment_are_in_use():
    """The suite tests the compiled CPU kernels only if they are there; a compiler is required."""
    (cpu,) = (b for b in backends.diagnose() if b.name == 'C++ kernels for the CPU')
    assert cpu.available, str(cpu)
    for operator in ('bi_wkv_forward', 'bi_wkv_backward', 'q_shift'):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'vrwkv_ops::{operator}', 'CPU')


def test_never_built(fresh_backends, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, '_BUILD_INFO', tmp_path / 'absent.json')
    backends.load()
    cuda, _, cpu, scan = backends.diagnose()
    assert not cuda.available and not cpu.available and scan.available
    assert 'not compiled' in cpu.why and 'pip install' in cpu.fix


def test_built_for_another_torch(fresh_backends, monkeypatch, tmp_path):
    _write_info(monkeypatch, tmp_path, torch='1.13.1+cu117')
    with pytest.warns(RuntimeWarning, match=r'compiled for torch 1\.13\.1.*Reinstall'):
        backends.load()
    cuda, _, cpu, _ = backends.diagnose()
    assert not cpu.available and 'torch 1.13.1+cu117' in cpu.why and 'Reinstall' in cpu.fix
    assert cuda.why == 'no nvcc was found' and cuda.fix.startswith('Install it: ')
    with warnings.catch_warnings():  # said once, at import
        warnings.simplefilter('error')
        backends.warn_if_slow(torch.device('cpu'))


@pytest.mark.parametrize(
    ('origin', 'installer', 'command'),
    [
        (
            {'url': 'file:///a%20b/vrwkv_ops', 'dir_info': {}},
            'pip',
            "pip install {} '/a b/vrwkv_ops'",
        ),
        ({'url': 'file:///a', 'dir_info': {'editable': True}}, 'uv', 'uv pip install {} -e /a'),
        (
            {
                'url': 'https://host/v.git',
                'vcs_info': {'vcs': 'git', 'commit_id': 'abc'},
                'subdirectory': 'vrwkv_ops',
            },
            'pip',
            "pip install {} 'git+https://host/v.git@abc#subdirectory=vrwkv_ops'",
        ),
        ({'url': 'file:///v.whl', 'archive_info': {}}, 'pip', 'pip install {} <the sources of'),
        (None, 'uv', 'uv pip install {} <the sources of'),
    ],
)
def test_how_to_reinstall(monkeypatch, origin, installer, command):
    files = {'direct_url.json': origin and json.dumps(origin), 'INSTALLER': f'{installer}\n'}
    distribution = SimpleNamespace(read_text=files.get)
    monkeypatch.setattr(backends.importlib.metadata, 'distribution', lambda name: distribution)
    options = '--force-reinstall --no-deps --no-build-isolation'
    assert backends.reinstall_command().startswith(command.format(options))


def test_how_to_compile_a_source_folder(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(backends.importlib.metadata, 'distribution', missing)
    assert backends.reinstall_command().endswith(f'-e {_PACKAGE}')


def test_file_that_does_not_load(fresh_backends, monkeypatch, tmp_path):
    (tmp_path / '_C.so').write_bytes(b'no library')
    _write_info(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match='does not load.*Reinstall'):
        backends.load()
    assert not backends.diagnose()[2].available


def test_slow_path_warns_once_per_device(fresh_backends, monkeypatch, tmp_path):
    _write_info(monkeypatch, tmp_path, cpu=dict(built=False, why='no compiler', fix='Install one'))
    backends.load()
    with pytest.warns(RuntimeWarning, match=r'on cpu.*no compiler\. Install one'):
        backends.warn_if_slow(torch.device('cpu'))
    with pytest.warns(RuntimeWarning, match='on cuda.*no nvcc was found'):
        backends.warn_if_slow(torch.device('cuda', 0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for device in ('cpu', 'cuda:1', 'meta'):
            backends.warn_if_slow(torch.device(device))


def test_operators_work_without_kernels():
    """A process without compiled kernels: the scan serves it, with one warning."""
    script = """
import warnings
import torch, vrwkv_ops
from vrwkv_ops.reference import bi_wkv_reference
w, u = torch.randn(2, 8, requires_grad=True)
k, v = torch.randn(2, 2, 6, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    y = vrwkv_ops.bi_wkv(w, u, vrwkv_ops.q_shift(k, (2, 3)), v)
    g = torch.autograd.grad(y.square().sum(), v, retain_graph=True)[0]
assert len([c for c in caught if 'pure-PyTorch' in str(c.message)]) == 1, caught
r = bi_wkv_reference(w, u, vrwkv_ops.q_shift(k, (2, 3)), v)
torch.testing.assert_close(y, r)
torch.testing.assert_close(g, torch.autograd.grad(r.square().sum(), v)[0])
"""
    result = subprocess.run(
        [sys.executable, '-c', HIDE_KERNELS + script], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_old_torch():
    script = 'import torch; del torch.library.register_fake; import vrwkv_ops'
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith('ImportError: vrwkv_ops needs torch 2.4') and 'pip install' in last


def test_python_m_vrwkv_ops():
    result = subprocess.run(
        [sys.executable, '-m', 'vrwkv_ops'], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert torch.__version__ in lines[0]
    for line, following in zip(lines, [*lines[1:], ''], strict=True):
        if line.startswith('[ ]'):  # a reason, and what to do
            assert ': ' in line and following.startswith('      ')
    for name in ('CUDA kernels', 'Triton kernels', 'C++ kernels for the CPU', 'pure-PyTorch scan'):
        assert sum(name in line for line in lines if line.startswith('[')) == 1


@pytest.mark.parametrize(
    ('archs', 'runs'),
    [
        ('9.0', True),
        ('8.0;9.0', True),
        ('8.0 9.0', True),
        ('8.0', False),
        ('8.0+PTX', True),
        ('12.0+PTX', False),
        ('8.0;12.0+PTX', False),
        ('Hopper', True),
    ],
)
def test_whether_kernels_cover_a_gpu(fresh_backends, monkeypatch, archs, runs):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9, 0))
    for device_type in ('cuda', 'triton', 'cpu'):
        backends._loaded[device_type] = backends.Backend('x', True, 'compiled', archs=archs)
    cuda = backends.diagnose()[0]
    assert cuda.available is runs
    assert runs or ('this GPU is 9.0' in cuda.why and 'TORCH_CUDA_ARCH_LIST=9.0' in cuda.fix)
