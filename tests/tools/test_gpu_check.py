"""The check of a GPU machine, tried on the CPU."""

import re
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def tool(load_script):
    return load_script('tools/gpu_check.py')


def test_problems(tool, monkeypatch, capsys):
    """It names what is missing and does nothing. (With a GPU it would run for long.)"""
    assert not tool.find_problem('cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert tool.main([]) == 2
    assert capsys.readouterr().err.startswith('Nothing was checked: torch ')
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'a build without CUDA' in tool.find_problem('cuda')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert 'torch sees no NVIDIA GPU' in tool.find_problem('cuda')
    monkeypatch.setattr(tool.importlib.metadata, 'version', lambda name: '75.0')
    assert "pip install 'setuptools>=77,<81'" in tool.find_problem('cpu')
    monkeypatch.setattr(tool.importlib.util, 'find_spec', lambda name: name == 'torch' or None)
    assert "pip install 'setuptools' 'wheel' 'ninja' 'numpy' 'pytest'" in tool.find_problem('cpu')
    monkeypatch.setattr(tool.importlib.util, 'find_spec', lambda name: None)
    assert 'torch is not installed' in tool.find_problem('cpu')


def test_parts_on_the_cpu(tool, tmp_path, capfd):
    """The tests and the benchmark as a GPU machine runs them, but for the device and the sizes."""
    parts = ['tests', 'sanitizer', 'operators']
    status = tool.main(['--device', 'cpu', '--quick', '--folder', str(tmp_path), '--parts', *parts])
    page = (tmp_path / 'summary.md').read_text()
    assert status == 0, page
    assert page.startswith('# GPU check: PASS\n') and page in capfd.readouterr().out
    assert torch.__version__ in page
    assert '## PASS tests' in page and ' passed' in page
    assert page.index('## PASS operators') < page.index('## SKIPPED sanitizer')
    # One image of 16 tokens and 24 channels, then three of them.
    assert re.search(r'float32 +\| +64 \| 1 \| +16 \| bi_wkv +\| forward\+backward +\|', page)
    assert re.search(r'float32 +\| +64 \| 3 \| +16 \| bi_wkv +\| forward +\|', page)
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
    environment = tool.Check('cpu', tmp_path, False).environment
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / 'site'))


def test_a_part_that_fails_or_takes_too_long(tool, tmp_path, monkeypatch):
    """The page is there after each part, and later parts still run."""

    def fail(check, *args):
        check.run('tests', [sys.executable, '-c', 'print("FAILED a.py::b"); raise SystemExit(1)'])

    def hang(check):
        assert (tmp_path / 'summary.md').read_text().startswith('# GPU check: FAIL so far\n')
        check.run('operators', [sys.executable, '-c', 'import time; time.sleep(600)'])

    monkeypatch.setattr(tool.Check, 'tests', fail)
    monkeypatch.setattr(tool.Check, 'operators', hang)
    monkeypatch.setitem(tool.LIMITS, 'operators', 1)
    arguments = ['--device', 'cpu', '--folder', str(tmp_path), '--parts', 'tests', 'operators']
    assert tool.main(arguments) == 1
    page = (tmp_path / 'summary.md').read_text()
    assert '## FAIL tests' in page and 'FAILED a.py::b' in page
    assert '## FAIL operators' in page and 'it took longer than 1 s' in page
