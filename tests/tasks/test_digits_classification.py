"""The digits: the folder that is written, and the demo from training to picture, made short."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vrwkv_cls.datasets import write_digits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits', size=8)


def test_every_digit_is_written_once_and_unchanged(digits):
    source = load_digits()
    indices = []
    for path in digits.glob('*/*/*.png'):
        index = int(path.stem)
        assert path.parent.name == str(source.target[index])
        expected = np.round(source.images[index] * 255 / 16)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)
        indices.append(index)
    assert sorted(indices) == list(range(1797))


def test_a_stratified_fifth_is_held_out(digits):
    total = Counter(load_digits().target.tolist())
    held_out = {
        int(folder.name): len(list(folder.iterdir())) for folder in (digits / 'val').iterdir()
    }
    assert sum(held_out.values()) == 360
    for digit, count in total.items():
        assert abs(held_out[digit] - count / 5) < 1


def test_the_split_is_always_the_same(digits, tmp_path):
    def names(root):
        return sorted(str(path.relative_to(root)) for path in root.glob('*/*/*.png'))

    again = write_digits(tmp_path / 'a/digits', size=8)
    assert names(again) == names(digits)


def test_written_once_only(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob('*')}
    write_digits(digits)
    assert before == {path: path.stat().st_mtime_ns for path in digits.rglob('*')}


def test_size(tmp_path):
    root = write_digits(tmp_path / 'digits')
    assert Image.open(next(root.glob('val/3/*.png'))).size == (32, 32)


def test_recovers_from_an_interruption(tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def die_at_the_hundredth(self, path):
        if len(saved) == 100:
            raise KeyboardInterrupt
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(Image.Image, 'save', die_at_the_hundredth)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / 'digits', size=8)
    assert not (tmp_path / 'digits').exists()
    monkeypatch.undo()
    root = write_digits(tmp_path / 'digits', size=8)
    assert len(list(root.glob('*/*/*.png'))) == 1797
    assert os.listdir(tmp_path) == ['digits']


def test_another_folder_of_that_name_is_left_alone(tmp_path):
    (tmp_path / 'digits').mkdir()
    with pytest.raises(FileExistsError, match='holds 0 digits, not 1797: remove it'):
        write_digits(tmp_path / 'digits')


@pytest.fixture
def demo(load_script):
    return load_script('demo/digits_demo.py')


def short_config(folder, data_root, epochs=2, embed_dims=32):
    """Write a config of a still smaller model that trains for a few seconds."""
    data = dict(dataset=dict(data_root=str(data_root)), num_workers=0)
    config = folder / 'short.py'
    config.write_text(
        f"""_base_ = [{str(ROOT / 'configs/classification/vrwkv-nano_1xb64_digits.py')!r}]
model = dict(backbone=dict(embed_dims={embed_dims}, depth=2), head=dict(in_channels={embed_dims}))
train_dataloader = dict(**{data!r}, batch_size=32)
val_dataloader = {data!r}
test_dataloader = {data!r}
optim_wrapper = dict(optimizer=dict(lr=5e-3))
param_scheduler = []
train_cfg = dict(max_epochs={epochs})
"""
    )
    return config


def trained_epochs(log):
    return {int(epoch) for epoch in re.findall(r'Epoch\(train\) +\[(\d+)\]', log)}


def test_tools_run_in_new_processes(load_script, tmp_path, capfd):
    """The other tests of demos run them in this process (``tool_calls``)."""
    tools, log = load_script('demo/demo_tools.py'), tmp_path / 'new/demo.log'
    tools.run_tool('test.py', '--help', log=log)
    assert capfd.readouterr().out == ''
    assert 'usage: test.py' in log.read_text()
    with pytest.raises(SystemExit, match=r'arguments are required.*\ntools/test.py failed; .*log'):
        tools.run_tool('test.py', log=log)  # without a config


def test_progress(load_script, capsys):
    """Loss, accuracy and time left; a line for each log of a training, the last one at the end."""
    tools = load_script('demo/demo_tools.py')
    head = '11/25 19:00:00 - mmengine - INFO - '
    lines = [
        'Hooks will be executed in the following order:',
        f'{head}Epoch(train)   [1][10/23]  lr: 1e-03  eta: 0:01:40  time: 0.1  loss: 2.3026',
        f'{head}Epoch(val) [1][6/6]    accuracy/top1: 81.1111  data_time: 0.0014  time: 0.0118',
        f'{head}Iter(train) [ 50/1000]  base_lr: 1e-03 lr: 1e-03  eta: 0:00:09  time: 1  loss: 0.5',
    ]
    first = '  Epoch [1][10/23]  loss 2.3026  left 0:01:40'
    last = '  Iter [ 50/1000]  loss 0.5  accuracy/top1 81.1111  left 0:00:09'
    for seconds in (0, 1000):
        progress = tools.Progress(seconds)
        for line in lines:
            progress.update(line)
        progress.end()
        assert capsys.readouterr().out.splitlines() == [first, last]


def test_output_goes_to_a_file(load_script, tmp_path, capfd):
    """Output of Python and of child processes; none of it is lost before or after."""
    tools, log = load_script('demo/demo_tools.py'), tmp_path / 'output.log'
    for verbose in (False, True):
        sys.stdout.write('before\n')
        with tools.output_to(log, verbose):
            os.write(1, b'out\n')
            subprocess.run(['sh', '-c', 'echo err >&2'], check=True)
        sys.stdout.write('after\n')
        printed = capfd.readouterr()
        assert printed.out.splitlines() == ['before', *verbose * ['out'], 'after']
        assert printed.err == verbose * 'err\n'
    assert log.read_text() == 'out\nerr\n'
    with pytest.raises(ValueError, match='lost'), tools.output_to(log):
        raise ValueError('lost')
    sys.stdout.write('again\n')
    assert capfd.readouterr().out == 'again\n'


def test_demo(demo, run_demo, tool_calls, tmp_path):
    digits = tmp_path / 'digits'
    config = short_config(tmp_path, digits)
    out = run_demo(demo, config)
    assert trained_epochs(out) == {1, 2}
    accuracy = float(re.search(r'top-1 \(%\)  ([\d.]+)', out)[1])
    # Ten classes: chance is 10 %.
    assert accuracy > 50
    for kind in ('picture', 'checkpoint', 'log'):
        assert Path(re.search(rf'{kind} +(/.+)', out)[1]).stat().st_size > 0
    assert Image.open(tmp_path / 'work/predictions.png').size == (1560, 1056)

    # tools/test.py and mmpretrain's inferencer see the same images in the same way.
    predictions = demo.predict(config, tmp_path / 'work/epoch_2.pth', digits / 'val')
    assert len(predictions) == 360
    assert np.mean([p.right for p in predictions]) * 100 == pytest.approx(accuracy, abs=0.01)
    assert all(0.1 <= p.confidence <= 1 for p in predictions)

    again = run_demo(demo, config)
    assert trained_epochs(again) == set()
    assert f'top-1 (%)  {accuracy:.4g}\n' in again

    # As if killed in the second epoch.
    (tmp_path / 'work/epoch_2.pth').unlink()
    (tmp_path / 'work/last_checkpoint').write_text(str(tmp_path / 'work/epoch_1.pth'))
    resumed = run_demo(demo, config)
    assert trained_epochs(resumed) == {2}
    # Random state comes from seed and epoch: it ends where the unbroken training did.
    assert f'top-1 (%)  {accuracy:.4g}\n' in resumed

    for change, key in (
        (dict(embed_dims=16), 'model.backbone'),
        (dict(epochs=3), 'train_cfg.max_'),
    ):
        with pytest.raises(SystemExit, match=rf'another {key}.* than .* has now: remove'):
            run_demo(demo, short_config(tmp_path, digits, **change))

    # Another test set: no old result stands for it.
    config = short_config(tmp_path, digits)
    config.write_text(f"{config.read_text()}test_dataloader['dataset']['indices'] = 8\n")
    tool_calls.clear()
    run_demo(demo, config)
    assert tool_calls == ['test.py']


def test_mistakes(demo, run_demo, tmp_path, capfd):
    with pytest.raises(SystemExit):
        run_demo(demo, tmp_path / 'none.py')
    assert re.search(r'config /.*none\.py does not exist', capfd.readouterr().err)
    (tmp_path / 'full').mkdir()
    with pytest.raises(SystemExit, match=r'error: .*full exists and holds 0 digits'):
        run_demo(demo, short_config(tmp_path, tmp_path / 'full'))
    imagenet = ROOT / 'configs/classification/vrwkv-tiny_8xb128_in1k.py'
    with pytest.raises(
        SystemExit, match=r'vrwkv-tiny_8xb128_in1k\.py has no digits: this demo takes'
    ):
        run_demo(demo, imagenet)
    assert not (ROOT / 'data/imagenet').exists()


def test_interrupt(load_script, tmp_path, monkeypatch):
    tools = load_script('demo/demo_tools.py')

    def interrupted(self, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools.Progress, 'update', interrupted)
    with pytest.raises(SystemExit, match=r'Interrupted\. The same command continues'):
        tools.run_tool('test.py', '--help', log=tmp_path / 'log')
