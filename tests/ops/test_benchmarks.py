"""The operator benchmark: what it checks, counts, refuses and writes."""

import argparse
import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vrwkv_ops import benchmarking, bi_wkv
from vrwkv_ops.reference import bi_wkv_reference

FOLDER = Path(__file__).resolve().parents[2] / 'vrwkv_ops' / 'benchmarks'

PEERS = """
import torch
from vrwkv_ops.reference import bi_wkv_reference

def scan(w, u, k, v):
    return bi_wkv_reference(w, u, k, v)

def wrong(w, u, k, v):
    return bi_wkv_reference(w, u, k, v) * 1.0001

class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        return 1.0001 * grad

def wrong_gradient(w, u, k, v):
    return WrongGradient.apply(bi_wkv_reference(w, u, k, v))

def raises(w, u, k, v):
    raise ValueError('not today')

number = 3
"""
SMALL = ['--device', 'cpu', '--channels', '12', '--resolutions', '32', '--repeats', '1']


@pytest.fixture
def modules(monkeypatch):
    """The modules ``benchmarking`` and ``operators``."""
    monkeypatch.syspath_prepend(FOLDER)
    return benchmarking, importlib.import_module('operators')


@pytest.fixture
def peers(tmp_path):
    path = tmp_path / 'peers.py'
    path.write_text(PEERS)
    return path


def run(operators, capsys, folder, *args):
    status = operators.main([*SMALL, '--out', str(folder), *args])
    return status, json.loads((folder / 'operators.json').read_text()), capsys.readouterr()


def test_deformable_attention_beside_that_of_mmcv(modules, tmp_path, capsys, monkeypatch):
    status, content, _ = run(modules[1], capsys, tmp_path, '--deformable', '--channels', '24')
    errors = {row['kernel']: row['error'] for row in content['rows']}
    assert status == 0 and max(errors['ms_deform_attn'], errors['mmcv_deform_attn']) < 1e-5
    assert errors['bi_wkv6'] < 1e-5  # 3 heads of 8 channels
    wrong = modules[1].ms_deform_attn
    monkeypatch.setattr(modules[1], 'ms_deform_attn', lambda *args: 1.0001 * wrong(*args))
    status, _, printed = run(modules[1], capsys, tmp_path, '--deformable')
    assert status == 1 and 'No time for ms_deform_attn: wrong' in printed.err


def test_table_json_and_plot(modules, peers, tmp_path, capsys):
    dtypes = ['--dtype', 'float32', 'bfloat16']
    arguments = [*dtypes, '--peer', f'mine={peers}:scan']
    status, content, printed = run(modules[1], capsys, tmp_path, *arguments)
    assert status == 0
    rows = content['rows']
    ours = ['token_shift', 'sigmoid_gate', 'squared_relu']
    kernels = ['bi_wkv', 'mine', *ours, 'attention', 'exp']
    assert [row['kernel'] for row in rows] == kernels * 4
    assert all(row['seconds'] > 0 and not row['refused'] and row['tokens'] == 4 for row in rows)
    bar = {'float32': 1e-5, 'bfloat16': 2**-8}
    for row in rows:
        assert (row['error'] is None) == (row['kernel'] in ('attention', 'exp'))
        assert row['error'] is None or row['error'] < bar[row['dtype']]
    table = [line for line in printed.out.splitlines() if line.startswith('|')]
    assert len(table) == 2 + len(rows) and all('mine' in line for line in table[3::7])
    for fact in ('processor', 'torch', 'kernels', 'command', 'commit'):
        assert content['environment'][fact] and f'{fact}: ' in printed.out
    with Image.open(tmp_path / 'operators.png') as image:
        assert image.size[0] > 800


def test_batch_for_a_number_of_elements(modules, tmp_path, capsys):
    """48 elements an image: 5 images have 200."""
    _, content, _ = run(modules[1], capsys, tmp_path, '--elements', '200', '--heads', '0')
    assert {row['batch'] for row in content['rows']} == {5}


def test_bytes_are_those_of_the_design(modules):
    """Design section 2: k, v, y; then k, v, gy and what was saved, gk and gv. Here 48 elements."""
    args = argparse.Namespace(
        batch_size=1, elements=0, channels=12, device=torch.device('cpu'), peer=[], heads=3
    )
    for dtype, forward, both in (
        (torch.float32, 12, (12 + 4) + (12 + 4 + 4 + 8)),  # y, too, is read
        (torch.bfloat16, 6, (6 + 4 + 2) + (6 + 2 + 4 + 2 + 4)),
    ):
        kernels = modules[1].make_kernels(args, dtype, 32)
        assert kernels['bi_wkv'].bytes == (forward * 48, both * 48)
        assert kernels['token_shift'].bytes[0] == 4 * 48 * dtype.itemsize
        assert kernels['sigmoid_gate'].bytes == (3 * 48 * dtype.itemsize, 8 * 48 * dtype.itemsize)


@pytest.mark.parametrize(
    ('name', 'reason', 'timed'),
    [
        ('wrong', 'wrong: relative error 1.0e-04, at most 1.0e-05', []),
        ('wrong_gradient', 'wrong: relative error 1.0e-04', ['forward']),
        ('raises', 'failed: ValueError: not today', []),
    ],
)
def test_no_time_for_a_wrong_kernel(modules, peers, tmp_path, capsys, name, reason, timed):
    status, content, printed = run(modules[1], capsys, tmp_path, '--peer', f'bad={peers}:{name}')
    assert status == 1
    rows = [row for row in content['rows'] if row['kernel'] == 'bad']
    assert [row['direction'] for row in rows if row['seconds'] is not None] == timed
    assert reason in rows[1]['refused'] and reason in printed.out
    assert 'No time for bad' in printed.err
    # All others are measured.
    assert all(row['seconds'] for row in content['rows'] if row['kernel'] != 'bad')


def test_error_of(modules):
    error_of = modules[1].error_of
    truth = [torch.ones(10, dtype=torch.float64)]
    assert error_of([torch.ones(10)], truth) == (0, '')
    assert 'wrong' in error_of([torch.full((10,), 1.0001)], truth)[1]
    assert 'wrong' in error_of([torch.full((10,), math.nan)], truth)[1]
    assert 'shape' in error_of([torch.ones(11)], truth)[1]
    third = [torch.full((10,), 1 / 3, dtype=torch.float64)]
    rounded = torch.full((10,), 1 / 3, dtype=torch.bfloat16)
    assert error_of([rounded], third)[1] == ''
    assert 'wrong' in error_of([rounded + 2**-9], third)[1]


def test_right_kernels_are_not_refused(modules):
    """The loops and our kernels pass on the benchmark's own inputs."""
    args = argparse.Namespace(
        batch_size=2, elements=0, channels=8, device=torch.device('cpu'), peer=[], heads=0
    )
    kernel = modules[1].make_kernels(args, torch.float32, 64)['bi_wkv']
    for function in (bi_wkv, bi_wkv_reference):
        kernel.function = function
        assert modules[1].error_of(kernel.forward_backward(), kernel.truth)[1] == ''


def test_a_long_call_is_timed_once(modules):
    calls = []
    seconds = modules[0].time_calls(
        {'slow': lambda: (calls.append(1), time.sleep(0.03))}, torch.device('cpu'), 5, 0.02
    )
    assert len(calls) == 3  # warm-up, the one that tells how long it takes, and the sample
    assert seconds['slow'] >= 0.03


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--peer', 'mine'], 'expected NAME=FILE.py:FUNCTION'),
        (['--peer', 'mine=/nowhere/x.py:f'], 'there is no file /nowhere/x.py'),
        (['--peer', 'mine={peers}:absent'], "has no function 'absent'"),
        (['--peer', 'mine={peers}:number'], "has no function 'number'"),
        (['--peer', 'mine={broken}:f'], 'fails when it is imported: ZeroDivisionError'),
        (['--peer', 'exp={peers}:scan'], 'names that differ'),
        (['--peer', 'a={peers}:scan', '--peer', 'a={peers}:wrong'], 'names that differ'),
        (['--resolutions', '8'], 'start at 16'),
        (['--resolutions', '-3'], "a number from 1, got '-3'"),
        (['--repeats', '0'], 'a number from 1'),
        (['--heads', '5'], '--heads must divide --channels 12, got 5'),
        (['--channels', '3'], 'at least 4'),
        (['--dtype', 'int8'], 'invalid choice'),
        (['--device', 'gpu'], "'gpu' cannot be used"),
    ],
)
def test_wrong_arguments(modules, peers, tmp_path, capsys, arguments, message):
    broken = tmp_path / 'broken.py'
    broken.write_text('1 / 0')
    arguments = [text.format(peers=peers, broken=broken) for text in arguments]
    with pytest.raises(SystemExit) as stop:
        modules[1].main([*SMALL, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
