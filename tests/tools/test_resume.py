"""A training killed at any moment ends, once resumed, where the unbroken one ends: bit for bit."""

import os
import random
import shutil
import signal
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vrwkv.engine import AtomicCheckpointHook, CheckpointError, cli, find_checkpoints, hooks
from vrwkv.engine.hooks import AtomicLocalBackend

WORKERS = {
    'no workers': (0, False),
    'new workers': (2, False),
    'persistent workers': (2, True),
}


def assert_same_training(actual, expected):
    """Compare all that a checkpoint says of a training's state."""
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        torch.testing.assert_close(actual[key], expected[key], rtol=0, atol=0)
    assert actual['param_schedulers'] == expected['param_schedulers']
    for key in ('epoch', 'iter', 'seed'):
        assert actual['meta'][key] == expected['meta'][key]


def finish_and_compare(config, broken, unbroken, load):
    """Resume the training in ``broken``, and train the same way without a break in ``unbroken``."""
    cli.train([str(config), '--work-dir', str(broken), '--resume'])
    resumed = load(broken / 'epoch_4.pth')
    again = config.with_name(
        f'unbroken-{config.name}'
    )  # mmengine tells runs apart by name and second
    again.write_text(config.read_text() + f'\nrandomness = dict(seed={resumed["meta"]["seed"]})\n')
    cli.train([str(again), '--work-dir', str(unbroken)])
    assert_same_training(resumed, load(unbroken / 'epoch_4.pth'))


@pytest.mark.parametrize('workers', WORKERS)
def test_killed_in_epoch(workers, toy_config, run, load, tmp_path):
    number, persistent = WORKERS[workers]
    changes = f'train_dataloader.update(num_workers={number}, persistent_workers={persistent})'
    killed = toy_config(
        'killed', f"{changes}\ncustom_hooks += [dict(type='DieInEpoch', iteration=15)]"
    )
    work_dir = tmp_path / 'broken'
    result = run('train.py', killed, '--work-dir', work_dir, check=False)
    assert result.returncode == -signal.SIGKILL, result.stdout
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'epoch_2.pth')
    finish_and_compare(toy_config('resumed', changes), work_dir, tmp_path / 'unbroken', load)


def test_killed_in_save(toy_config, run, load, tmp_path):
    # Saves 1 to 3: epoch 1, its best, epoch 1 again with the best score. 4: epoch 2. One is kept.
    changes = "default_hooks['checkpoint']['max_keep_ckpts'] = 1"
    killed = toy_config('killed', f"{changes}\ncustom_hooks += [dict(type='DieInSave', saves=4)]")
    work_dir = tmp_path / 'broken'
    result = run('train.py', killed, '--work-dir', work_dir, check=False)
    assert result.returncode == -signal.SIGKILL, result.stdout
    assert (work_dir / 'epoch_2.pth.tmp').exists()
    assert find_checkpoints(work_dir) == [work_dir / 'epoch_1.pth']
    load(work_dir / 'epoch_1.pth')
    finish_and_compare(toy_config('resumed', changes), work_dir, tmp_path / 'unbroken', load)
    assert not list(work_dir.glob('*.tmp'))


def test_truncated_newest_checkpoint_is_passed_over(toy_config, load, tmp_path):
    work_dir = tmp_path / 'work'
    cli.train([str(toy_config('start')), '--work-dir', str(work_dir)])
    newest = work_dir / 'epoch_4.pth'
    whole = load(newest)
    newest.write_bytes(newest.read_bytes()[:-1000])
    cli.train([str(toy_config('resumed')), '--work-dir', str(work_dir), '--resume'])
    log = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
    assert f'Cannot resume from {newest}' in log
    assert 'is truncated' in log
    assert f'Resuming from {work_dir / "epoch_3.pth"}.' in log
    assert_same_training(load(newest), whole)


def test_nothing_to_resume_starts_from_scratch_and_says_so(toy_config, load, tmp_path):
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    (work_dir / 'epoch_3.pth').write_bytes(b'')
    cli.train([str(toy_config()), '--work-dir', str(work_dir), '--resume'])
    log = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
    assert 'epoch_3.pth' in log
    message = (
        f'There is no whole checkpoint to resume from in {work_dir}: training starts from scratch.'
    )
    assert message in log
    assert load(work_dir / 'epoch_4.pth')['meta']['iter'] == 24


def test_automatic_resume_starts_from_load_from_the_first_time(toy_config, load, tmp_path):
    cli.train([str(toy_config('first')), '--work-dir', str(tmp_path / 'first')])
    weights = tmp_path / 'first' / 'epoch_4.pth'
    cli.train([
        str(toy_config('second')), '--work-dir', str(tmp_path / 'second'), '--resume',
        '--cfg-options', f'load_from={weights}', 'train_cfg.max_epochs=1',
        'optim_wrapper.optimizer.lr=0.', 'optim_wrapper.optimizer.weight_decay=0.',
        'param_scheduler=None',
    ])  # fmt: skip
    second = load(tmp_path / 'second' / 'epoch_1.pth')
    assert second['meta']['iter'] == 6  # not resumed
    expected = load(weights)['state_dict']['head.weight']
    torch.testing.assert_close(second['state_dict']['head.weight'], expected, rtol=0, atol=0)


def test_resume_from_weights_alone_is_refused(toy_config, tmp_path):
    import toy

    path = tmp_path / 'weights.pth'
    torch.save(toy.ToyModel().state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r'weights\.pth.* holds weights but no state of a training'
    ):
        cli.train([str(toy_config()), '--work-dir', str(tmp_path / 'work'), '--resume', str(path)])


def test_accumulation_is_exact(toy_config, load, tmp_path):
    """Epochs of 6 iterations in steps of 4: no gradient may cross the end of an epoch."""
    changes = "optim_wrapper['accumulative_counts'] = 4\nrandomness = dict(seed=1)"
    unbroken, resumed = tmp_path / 'unbroken', tmp_path / 'resumed'
    cli.train([str(toy_config('unbroken', changes)), '--work-dir', str(unbroken)])
    resumed.mkdir()
    shutil.copy(unbroken / 'epoch_3.pth', resumed)
    cli.train([str(toy_config('resumed', changes)), '--work-dir', str(resumed), '--resume'])
    assert_same_training(load(resumed / 'epoch_4.pth'), load(unbroken / 'epoch_4.pth'))
    steps = load(unbroken / 'epoch_4.pth')['optimizer']['state'][0]['step']
    assert steps == 4 * 2  # of 4 and 2 iterations in each epoch


def test_last_step_of_an_epoch_takes_the_mean_gradient(toy_config, load, tmp_path):
    """Steps of 4 among 6 equal iterations move by the same gradient, whether of 4 or of 2."""
    changes = """
    model = dict(type='ToyModel', dropout=0., norm='Identity')
    train_dataloader['dataset'].update(augment=False)
    train_dataloader['batch_size'] = 24
    train_cfg = dict(by_epoch=True, max_epochs=2)
    optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.5))
    param_scheduler = None
    custom_hooks = []
    randomness = dict(seed=1)
    """
    weights = []
    for name, repeats, counts in (('six', 6, 4), ('two', 2, 1)):
        config = toy_config(
            name,
            f"{textwrap.dedent(changes)}\ntrain_dataloader['dataset']['repeats'] = {repeats}\n"
            "train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=False)\n"
            f"optim_wrapper['accumulative_counts'] = {counts}",
        )
        cli.train([str(config), '--work-dir', str(tmp_path / name), '--no-validate'])
        weights.append(load(tmp_path / name / 'epoch_2.pth')['state_dict'])
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)  # sums of float32 in another order


def saved_best(folder):
    return sorted(path.name for path in folder.glob('best_*'))


@pytest.mark.parametrize('copied', [False, True])
@pytest.mark.parametrize('indicators', [1, 2])
def test_files_of_another_run_are_kept(copied, indicators, toy_config, load, tmp_path):
    changes = 'randomness = dict(seed=0)\ncustom_hooks = []\n'
    if indicators == 2:
        changes += """default_hooks['checkpoint'].update(
            save_best=['toy/likelihood', 'toy/count'], rule=['greater', 'greater'])\n"""
    old, new = tmp_path / 'old', tmp_path / 'new'
    first = toy_config('first', f'{changes}train_cfg = dict(by_epoch=True, max_epochs=2)')
    cli.train([str(first), '--work-dir', str(old)])
    before = {path: path.read_bytes() for path in old.glob('*.pth')}
    assert len(before) == 2 + indicators
    resume = ['--resume', str(old / 'epoch_2.pth')]
    if copied:
        shutil.copytree(old, new)
        (old / 'epoch_2.pth').write_bytes(b'')  # the copy must not read it
        before[old / 'epoch_2.pth'] = b''
        resume = ['--resume']
    cli.train([str(toy_config('second', changes)), '--work-dir', str(new), *resume])
    assert {path: path.read_bytes() for path in old.glob('*.pth')} == before
    assert load(new / 'epoch_4.pth')['meta']['iter'] == 24
    best = [name for name in saved_best(new) if 'likelihood' in name]
    assert len(best) == 1  # the copy of the old one is outdated
    assert best != [name for name in saved_best(old) if 'likelihood' in name]


def test_weights_beside_no_training_are_not_loaded(toy_config, load, tmp_path):
    import toy

    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    model = toy.ToyModel()
    torch.nn.init.constant_(model.head.bias, 0.5)
    torch.save(dict(state_dict=model.state_dict(), meta=None), work_dir / 'released_224.pth')
    cli.train([
        str(toy_config(changes='param_scheduler = None')), '--work-dir', str(work_dir), '--resume',
        '--cfg-options', 'train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=0.',
    ])  # fmt: skip
    log = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
    assert f'Cannot resume from {work_dir / "released_224.pth"}' in log
    assert 'training starts from scratch' in log
    assert (load(work_dir / 'epoch_1.pth')['state_dict']['head.bias'] != 0.5).all()


def test_best_checkpoint_cannot_be_resumed(toy_config, tmp_path):
    """It holds no state of the optimizer, which mmengine would start anew in silence."""
    config = [str(toy_config()), '--work-dir', str(tmp_path), '--cfg-options']
    cli.train([*config, 'train_cfg.max_epochs=2'])
    (best,) = tmp_path.glob('best_*')
    with pytest.raises(CheckpointError, match=r'no state of a training to resume \(no optimizer\)'):
        cli.train([*config, 'train_cfg.max_epochs=3', '--resume', str(best)])


@pytest.mark.parametrize('explicit', [False, True])
def test_checkpoint_is_read_once(explicit, toy_config, tmp_path, monkeypatch):
    work_dir = tmp_path / 'work'
    options = ['--work-dir', str(work_dir), '--cfg-options']
    cli.train([str(toy_config('first')), *options, 'train_cfg.max_epochs=2'])
    newest = str(work_dir / 'epoch_2.pth')
    read = []
    torch_load = torch.load

    def count(file, *args, **kwargs):
        read.append(str(file))
        return torch_load(file, *args, **kwargs)

    monkeypatch.setattr(torch, 'load', count)
    resume = ['--resume', newest] if explicit else ['--resume']
    cli.train([str(toy_config('second')), *options, 'train_cfg.max_epochs=3', *resume])
    assert read == [newest]


@pytest.mark.parametrize(
    ('scheduler', 'warned'),
    [
        ("[dict(type='CosineAnnealingLR', end=2, T_max=2, convert_to_iter_based=True)]", True),
        ("[dict(type='LinearLR', start_factor=0.1, end=1)]", False),  # constant since epoch 1
        ('None', False),
    ],
)
def test_longer_training_on_resume(scheduler, warned, toy_config, load, tmp_path):
    changes = f'param_scheduler = {scheduler}'
    work = ['--work-dir', str(tmp_path / 'work'), '--cfg-options']
    cli.train([str(toy_config('first', changes)), *work, 'train_cfg.max_epochs=2'])
    cli.train([str(toy_config('second', changes)), *work, 'train_cfg.max_epochs=3', '--resume'])
    log = ''.join(path.read_text() for path in tmp_path.glob('work/*/*.log'))
    assert ('comes from a training with max_iters=12; this one has max_iters=18' in log) is warned
    assert ('set load_from=' in log) is warned
    assert load(tmp_path / 'work' / 'epoch_3.pth')['meta']['epoch'] == 3


@pytest.mark.parametrize('workers', WORKERS)
def test_augmentation_differs_between_epochs_and_repeats_with_the_seed(
    workers, toy_config, tmp_path
):
    import toy

    number, persistent = WORKERS[workers]
    changes = f"""
    train_dataloader.update(num_workers={number}, persistent_workers={persistent})
    train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=False)
    custom_hooks += [dict(type='RecordBatches')]
    randomness = dict(seed=3)
    train_cfg = dict(by_epoch=True, max_epochs=2)
    """
    recorded = []
    for name in ('one', 'two'):
        toy.RecordBatches.epochs.clear()
        cli.train(
            [str(toy_config(name, changes)), '--work-dir', str(tmp_path / name), '--no-validate']
        )
        recorded.append([torch.cat(epoch) for epoch in toy.RecordBatches.epochs])
    (first, second), again = recorded
    torch.testing.assert_close([first, second], again, rtol=0, atol=0)
    assert (first != second).any(dim=1).all()  # every sample, in its second epoch, is another
    # Within an epoch no two samples get the same noise (what two workers seeded alike would give).
    noise = first - toy.ToyDataset(augment=False).points
    assert len(torch.unique(noise[:, 0])) == len(noise)


def test_a_whole_checkpoint_is_there_whenever_one_is_removed(
    toy_config, load, tmp_path, monkeypatch
):
    removed = []
    remove = AtomicLocalBackend.remove

    def check_and_remove(self, path):
        kind = 'best_*' if 'best_' in path else 'epoch_*'
        others = [other for other in tmp_path.glob(f'work/{kind}.pth') if str(other) != path]
        assert others
        for other in others:
            load(other)
        assert (tmp_path / 'work' / 'last_checkpoint').read_text() != path
        removed.append(path)
        remove(self, path)

    monkeypatch.setattr(AtomicLocalBackend, 'remove', check_and_remove)
    changes = "default_hooks['checkpoint']['max_keep_ckpts'] = 1\nrandomness = dict(seed=0)"
    cli.train([str(toy_config(changes=changes)), '--work-dir', str(tmp_path / 'work')])
    assert sum('best_' in path for path in removed) >= 1
    assert sum('epoch_' in path and 'best_' not in path for path in removed) == 3
    assert sorted(path.name for path in tmp_path.glob('work/epoch_*')) == ['epoch_4.pth']
    assert len(list(tmp_path.glob('work/best_*'))) == 1


def test_other_checkpoint_hooks_are_left_alone():
    from mmengine.config import Config

    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='MyHook'))))
    cli.make_resumable(cfg)
    cli.make_resumable(cfg)
    assert cfg.default_hooks.checkpoint.type == 'MyHook'
    assert [hook['type'] for hook in cfg.custom_hooks] == ['EpochSeedHook']
    remote = AtomicCheckpointHook(backend_args=dict(backend='petrel'))
    assert remote.backend_args == dict(backend='petrel')


def test_find_checkpoints_trusts_last_checkpoint_over_names(tmp_path):
    for name in (
        'epoch_9.pth',
        'epoch_2.pth',
        'best_acc_epoch_9.pth',
        'epoch_3-0123abcd.pth',
        'notes_1.txt',
    ):
        (tmp_path / name).write_text('')
    (tmp_path / 'last_checkpoint').write_text('/moved/away/epoch_2.pth')
    assert find_checkpoints(tmp_path) == [tmp_path / 'epoch_2.pth', tmp_path / 'epoch_9.pth']
    other = tmp_path / 'copied_from'
    other.mkdir()
    for name in ('epoch_2.pth', 'epoch_5.pth'):
        (other / name).write_text('')
    (tmp_path / 'last_checkpoint').write_text(str(other / 'epoch_2.pth'))
    own = [tmp_path / 'epoch_2.pth', tmp_path / 'epoch_9.pth']
    assert find_checkpoints(tmp_path)[:3] == [*own, other / 'epoch_2.pth']
    (tmp_path / 'last_checkpoint').write_text('')
    for seconds, name in enumerate(('epoch_9.pth', 'epoch_2.pth')):  # age counts, not the number
        os.utime(tmp_path / name, (seconds, seconds))
    assert find_checkpoints(tmp_path) == own
    assert find_checkpoints(tmp_path / 'none') == []


def test_each_process_draws_numbers_of_its_own(monkeypatch):
    loader = SimpleNamespace(worker_init_fn=None, persistent_workers=False)
    runner = SimpleNamespace(
        seed=1, epoch=0, train_dataloader=loader, optim_wrapper=None, train_loop=None
    )
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(hooks, 'get_rank', lambda rank=rank: rank)
        hooks.EpochSeedHook().before_train_epoch(runner)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert all(a != b for a, b in zip(*drawn, strict=True))
