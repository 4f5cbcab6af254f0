"""The commands of every README and docs page, with stand-ins for data, weights and other programs.

Bash runs each page in a copy of the checkout, where ``python``, ``pip``, ``make`` and the launchers
only record their arguments. What was recorded then runs here: ``tools/train.py`` and
``tools/test.py`` up to the point where they would read data or weights, with a model that has no
values; the other scripts up to their checked arguments, since tests of their own run them.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from PIL import Image

import vrwkv_seg  # noqa: F401
from vrwkv.engine import VRWKVRunner, cli, model_index

ROOT = Path(__file__).resolve().parents[2]
LISTED = subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.md'],
    cwd=ROOT, check=True, capture_output=True, text=True,
).stdout  # fmt: skip
PROGRAMS = (
    'python', 'pip', 'pre-commit', 'uv', 'mim', 'make', 'torchrun', 'srun', 'g++', 'git', 'find',
)  # fmt: skip
BUILT = ('run_aoti',)  # by a command before; tests/tools/test_export.py builds and runs it
RECORD = """#!/bin/sh
{ printf '%s\\t' "$(basename "$0")" "$@"; echo; } >> "$COMMANDS"
"""


def fenced(text, *languages):
    """Return the code blocks in one of some languages."""
    return [
        textwrap.dedent(body)
        for language, body in re.findall(r'^ *```(\w+)\n(.*?)^ *```', text, re.S | re.M)
        if language in languages
    ]


PAGES = [
    page for page in LISTED.split() if fenced((ROOT / page).read_text(), 'bash', 'shell', 'sh')
]


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """Copy what commands name, beside programs that only record how they were called."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('configs', 'tools', 'demo', 'vrwkv_ops/benchmarks'):
        shutil.copytree(ROOT / name, folder / name)
    (folder / 'my_kernel.py').write_text('def my_bi_wkv(w, u, k, v):\n    return v\n')
    programs = folder / '.venv' / 'bin'
    programs.mkdir(parents=True)
    (programs / 'activate').touch()
    for path in (*(programs / name for name in PROGRAMS), *(folder / name for name in BUILT)):
        path.write_text(RECORD)
        path.chmod(0o755)
    return folder


def record(page, checkout):
    """Run a page in bash. Return the programs that it called with their arguments."""
    text = (ROOT / page).read_text()
    commands = checkout / 'commands'
    commands.unlink(missing_ok=True)
    for name, body in re.findall(r'`(my_\w+\.py)`.*?```python\n(.*?)```', text, re.S):
        (checkout / name).write_text(body)
    environment = {'PATH': f'{checkout}/.venv/bin:/usr/bin:/bin', 'COMMANDS': str(commands)}
    script = 'set -eu\n' + '\n'.join(fenced(text, 'bash', 'shell', 'sh'))
    done = subprocess.run(
        ['bash', '-c', script], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = commands.read_text().splitlines() if commands.exists() else []
    return [tuple(line.removesuffix('\t').split('\t')) for line in lines]


@pytest.fixture(scope='module')
def seen():
    """Commands that ran already."""
    return set()


class Reached(Exception):  # noqa: N818
    """A command got as far as it goes here."""


@pytest.fixture
def stand_ins(checkout, monkeypatch):
    """Stop trainings and tests before they read data or weights, and scripts after parsing."""
    monkeypatch.chdir(checkout)
    build_runner, build_model = cli.build_runner, VRWKVRunner.build_model

    def without_launcher(cfg):
        cfg.launcher = 'none'
        return build_runner(cfg)

    def on_meta(runner, model):
        with torch.device('meta'):
            return build_model(runner, model)

    def train(runner):
        runner.build_optim_wrapper(runner.optim_wrapper)
        raise Reached

    def test(runner):
        raise Reached

    monkeypatch.setattr(cli, 'build_runner', without_launcher)
    monkeypatch.setattr(VRWKVRunner, 'build_model', on_meta)
    monkeypatch.setattr(VRWKVRunner, 'wrap_model', lambda runner, cfg, model: model)
    monkeypatch.setattr(VRWKVRunner, 'train', train)
    monkeypatch.setattr(VRWKVRunner, 'test', test)
    yield
    MMLogger._instance_dict.clear()


def run_script(path, arguments, monkeypatch):
    """Run a script of the checkout up to its parsed arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Reached

    monkeypatch.setattr('sys.argv', [str(path), *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_only)
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # data classes look there
    spec.loader.exec_module(module)
    with pytest.raises((Reached, SystemExit)) as stopped:
        module.main()
    # The page installs grad-cam or SAHI in the line before, which is not done here.
    assert stopped.type is Reached or re.search('grad-cam|SAHI', str(stopped.value))


def run_recorded(program, arguments, checkout, monkeypatch, seen):
    if program in ('torchrun', 'srun'):  # they run a tool with the rest of their arguments
        tool = re.compile(r'/(train|test)\.py$')
        first = next(i for i, name in enumerate(arguments) if tool.search(name))
        assert program == 'srun' or int(dict(a.split('=') for a in arguments[:first])['--nnodes'])
        program, arguments = 'python', arguments[first:]
        launcher = arguments.index('--launcher')
        del arguments[launcher : launcher + 2]
        arguments[0] = f'tools/{Path(arguments[0]).name}'
    if (program, *arguments) in seen:  # on another page, or by another launcher
        return
    seen.add((program, *arguments))
    if program == 'make':
        subprocess.run(['make', '-n', *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == 'mim':
        if arguments[0] == 'download':
            assert model_index.find_model(arguments[arguments.index('--config') + 1])
    elif program in ('pip', 'uv'):
        for name in arguments:
            if name.startswith('.'):
                folder, _, extras = name.partition('[')
                assert (ROOT / folder / 'pyproject.toml').is_file()
                text = (ROOT / 'pyproject.toml').read_text()
                assert not extras or f'\n{extras.removesuffix("]")} = [' in text
    elif program == 'python' and arguments[0] == '-c':
        compile(arguments[1], '-c', 'exec')
    elif program == 'python' and arguments[0] == '-m':
        assert importlib.util.find_spec(arguments[1])
    elif program == 'python':
        path = checkout / arguments[0]
        if path.name in ('train.py', 'test.py') and path.parent.name == 'tools':
            with pytest.raises(Reached):
                getattr(cli, path.stem)(list(arguments[1:]))
        else:
            run_script(path, arguments[1:], monkeypatch)
    else:
        assert program in ('pre-commit', 'g++', 'git', 'find', *BUILT)


@pytest.mark.parametrize('page', PAGES)
def test_commands_of_a_page(page, checkout, stand_ins, seen, monkeypatch):
    commands = record(page, checkout)
    assert commands
    for program, *arguments in dict.fromkeys(commands):
        with monkeypatch.context() as patch:
            run_recorded(program, arguments, checkout, patch, seen)


def test_python_of_the_pytorch_page(tmp_path, monkeypatch):
    """On a file like the released one, without a download."""
    import vrwkv

    monkeypatch.chdir(tmp_path)
    weights = vrwkv.create_model('vrwkv-tiny').state_dict()
    torch.save({'state_dict': weights}, 'vrwkv_t_in1k_224.pth')
    names = {}
    for block in fenced((ROOT / 'docs/pytorch.md').read_text(), 'python'):
        exec(block, names)
    assert [tuple(m.shape) for m in names['maps']] == [(2, 192, 32, 24)] * 4
    assert names['y'].shape == names['x'].shape == (2, 196, 192)
    assert names['grey'](torch.rand(1, 1, 32, 32)).shape == (1, 10)


def test_python_of_the_ecosystem_page():
    """A second scan over columns equals an operator on the transposed grid."""
    names = {}
    for block in fenced((ROOT / 'docs/ecosystem.md').read_text(), 'python'):
        exec(block, names)
    assert names['y'].shape == (2, 54, 32)
    assert torch.equal(names['rows'](names['columns'](names['k'])), names['k'])
    assert torch.equal(names['columns'](names['k'])[:, 1], names['k'][:, 9])


@pytest.mark.parametrize('page', ['detection/README.md', 'segmentation/README.md'])
def test_imports_of_a_page(page):
    """Their order matters without compiled mmcv."""
    blocks = '\n'.join(fenced((ROOT / page).read_text(), 'python'))
    imports = re.findall(r'^(?:import|from) .*', blocks, re.M)
    assert len(imports) == 2
    subprocess.run([sys.executable, '-c', '\n'.join(imports)], check=True, cwd=ROOT)


def config_of_a_page(page, text, folder):
    """Write the Python block of a page that has some text to a file, and load it."""
    (block,) = (b for b in fenced((ROOT / page).read_text(), 'python') if text in b)
    path = folder / 'of_a_page.py'
    path.write_text(block)
    return Config.fromfile(path)


@pytest.mark.parametrize(('zero', 'expected'), [(False, {0, 1, 2}), (True, {0, 1, 255})])
def test_label_maps_of_the_page_on_own_images(zero, expected, checkout, monkeypatch):
    """The config as it is, and with the line that it comments out."""
    monkeypatch.chdir(checkout)
    arrays = dict(images=np.zeros((64, 64, 3)), labels=np.arange(64 * 64).reshape(64, 64) // 8 % 3)
    for kind, values in arrays.items():
        folder = Path('data/my_images', kind, 'train')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(folder / 'a.png')
    cfg = config_of_a_page('docs/own_images.md', "type='CheckedSegDataset'", checkout)
    if zero:
        cfg.train_dataloader.dataset.reduce_zero_label = True
    with DefaultScope.overwrite_default_scope('mmseg'):
        sample = DATASETS.build(cfg.train_dataloader.dataset)[0]['data_samples']
    assert set(sample.gt_sem_seg.data.unique().tolist()) == expected


def test_config_of_mmseg_on_the_page_of_segmentation(tmp_path):
    cfg = config_of_a_page('segmentation/README.md', 'mmseg::', tmp_path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 19, 16, 16)
