"""A training killed at any moment ends, once resumed, where the unbroken one ends: bit for bit."""

import signal

import pytest
import torch

from vrwkv.engine import AtomicCheckpointHook, CheckpointError, cli, find_checkpoints
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
    assert f'Resumed from {work_dir / "epoch_3.pth"}.' in log
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
    (tmp_path / 'last_checkpoint').write_text('')
    assert {path.name for path in find_checkpoints(tmp_path)} == {'epoch_2.pth', 'epoch_9.pth'}
    assert find_checkpoints(tmp_path / 'none') == []
