"""The check of a GPU machine, tried on the CPU."""

import subprocess
import sys

import pytest
import torch


@pytest.fixture
def tool(load_script):
    return load_script('tools/gpu_check.py')


def test_without_a_gpu(run, tool, monkeypatch):
    """It says so and does nothing. (With one it would build and run for long.)"""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'torch sees no NVIDIA GPU' in tool.find_problem('cuda')
    result = run('gpu_check.py', check=False, CUDA_VISIBLE_DEVICES='')
    assert result.returncode == 2
    assert result.stdout.startswith('Nothing was checked: torch ')


def test_other_problems(tool, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'a build without CUDA' in tool.find_problem('cuda')
    assert not tool.find_problem('cpu')
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setattr(tool.importlib.util, 'find_spec', lambda name: None)
    assert 'torch is not installed' in tool.find_problem('cpu')


def test_parts_on_the_cpu(tool, tmp_path, capsys):
    """The tests and the benchmark as a GPU machine runs them, but for the device and the sizes."""
    parts = ['tests', 'sanitizer', 'operators']
    status = tool.main(['--device', 'cpu', '--quick', '--folder', str(tmp_path), '--parts', *parts])
    page = (tmp_path / 'summary.md').read_text()
    assert status == 0, page
    assert page.startswith('# GPU check: PASS\n') and page in capsys.readouterr().out
    assert torch.__version__ in page
    assert '## PASS tests' in page and ' passed' in page
    assert '## SKIPPED sanitizer' in page
    assert (
        '## PASS operators' in page and 'bi_wkv, float32, forward+backward, 1 x 64 pixels: ' in page
    )
    assert 'bi_wkv, float32, forward, 3 x 64 pixels: ' in page  # 16 tokens, 24 channels
    for name in ('tests.log', 'operators.log', 'operators/operators.json'):
        assert (tmp_path / name).stat().st_size > 100


def test_a_build_without_kernels_fails(tool, tmp_path, monkeypatch):
    """pip succeeds, but what it built is not what was asked for; nothing is tried after that."""
    monkeypatch.setenv('VRWKV_OPS_SKIP_BUILD', '1')
    status = tool.main(['--device', 'cpu', '--folder', str(tmp_path), '--parts', 'build', 'tests'])
    page = (tmp_path / 'summary.md').read_text()
    assert status == 1
    assert page.startswith('# GPU check: FAIL\n')
    assert 'VRWKV_OPS_SKIP_BUILD was set' in page and 'there are no C++ kernels' in page
    assert '## SKIPPED tests' in page and 'there is no build' in page
    # What was built is what ran.
    command = [sys.executable, '-c', 'import vrwkv_ops; print(vrwkv_ops.__file__)']
    environment = tool.Check('cpu', tmp_path, False).environment()
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / 'site'))


def test_a_failing_part_fails_the_check(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.Check, 'run', lambda *args, **kwargs: (1, '2 failed, 3 passed\n'))
    assert tool.main(['--device', 'cpu', '--folder', str(tmp_path), '--parts', 'tests']) == 1
    assert '## FAIL tests' in (tmp_path / 'summary.md').read_text()


def test_what_cannot_be_installed(tool, tmp_path, monkeypatch):
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    problem = tool.Check('cpu', tmp_path, False).need({'absent_package': 'absent-package>=1'})
    assert problem.startswith('cannot install absent-package>=1: ')
