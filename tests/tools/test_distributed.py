"""Several processes on a CPU do what one process does; the shell scripts around them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vrwkv.engine import cli

# No dropout, augmentation or batch norm: what the processes draw or see differs there.
DETERMINISTIC = """
model = dict(type='ToyModel', dropout=0., norm='Identity')
train_dataloader['dataset']['augment'] = False
randomness = dict(seed=5)
env_cfg = dict(dist_cfg=dict(backend='nccl'))
train_cfg = dict(by_epoch=True, max_epochs=2)
"""


def test_two_machines_train_like_one_process(toy_config, run, load, free_port, tmp_path):
    """Two 'machines' of one process each, started as a user would, against one process."""
    one = toy_config('one', DETERMINISTIC)
    cli.train([str(one), '--work-dir', str(tmp_path / 'one')])
    two = toy_config('two', f"{DETERMINISTIC}\ntrain_dataloader['batch_size'] = 2")

    def machine(rank):
        return run(
            'dist_train.sh',
            two,
            1,
            '--work-dir',
            tmp_path / 'two',
            NNODES='2',
            NODE_RANK=str(rank),
            PORT=free_port,
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(machine, range(2)))
    expected, actual = (load(tmp_path / name / 'epoch_2.pth') for name in ('one', 'two'))
    assert actual['meta']['iter'] == expected['meta']['iter'] == 12
    # Sums in another order, 12 AdamW steps of up to 0.05: rounding errors of 1e-7 stay below 1e-5.
    torch.testing.assert_close(actual['state_dict'], expected['state_dict'], rtol=1e-5, atol=1e-5)
    earlier = torch.load(tmp_path / 'one' / 'epoch_1.pth', weights_only=True)['state_dict']
    assert (earlier['head.weight'] - expected['state_dict']['head.weight']).abs().max() > 1e-2


def test_machines_that_share_no_folder_do_not_resume(toy_config, run, free_port, tmp_path):
    cli.train([str(toy_config('one')), '--work-dir', str(tmp_path / '0')])
    own = toy_config('two', f"work_dir = '{tmp_path}/{{{{$RANK:}}}}'")
    result = run('dist_train.sh', own, 2, '--resume', check=False, PORT=free_port)
    assert result.returncode
    assert 'different checkpoints in ' in result.stdout
    assert "by rank: ['epoch_4.pth', None]" in result.stdout


def test_two_processes_resume(toy_config, run, load, free_port, tmp_path):
    """Killed in the second epoch, they end where the unbroken training ends: bit for bit."""

    def train(name, folder, *options, more='', check=True):
        changes = "randomness = dict(seed=5)\nenv_cfg = dict(dist_cfg=dict(backend='gloo'))\n"
        options = ['--work-dir', tmp_path / folder, *options]
        config = toy_config(name, changes + more)
        return run('dist_train.sh', config, 2, *options, PORT=free_port, check=check)

    dies = "custom_hooks += [dict(type='DieInEpoch', iteration=7)]"
    assert train('killed', 'broken', more=dies, check=False).returncode
    assert not (tmp_path / 'broken/epoch_4.pth').exists()
    train('resumed', 'broken', '--resume')
    train('unbroken', 'unbroken')
    resumed, unbroken = (load(tmp_path / x / 'epoch_4.pth') for x in ('broken', 'unbroken'))
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        torch.testing.assert_close(resumed[key], unbroken[key], rtol=0, atol=0)


def test_two_processes_measure_like_one(toy_config, run, free_port, tmp_path):
    import toy

    torch.manual_seed(0)
    weights = tmp_path / 'weights.pth'
    torch.save(toy.ToyModel().state_dict(), weights)
    config = toy_config(changes='test_dataloader["dataset"]["size"] = 23')  # not even
    outs = [tmp_path / f'{number}.json' for number in (1, 2)]
    options = ['--work-dir', str(tmp_path / 'work'), '--out-item', 'metrics', '--out']
    cli.test([str(config), str(weights), *options, str(outs[0])])
    run('dist_test.sh', config, weights, 2, *options, outs[1], PORT=free_port)
    one, two = (json.loads(out.read_text()) for out in outs)
    assert one['toy/count'] == two['toy/count'] == 23
    # The double-precision mean over samples, of logits from batches of other sizes.
    assert one['toy/likelihood'] == pytest.approx(two['toy/likelihood'], rel=1e-6)


@pytest.mark.parametrize(
    'layers', ["model = dict(type='ToyModel', norm='SyncBatchNorm')", "sync_bn = 'torch'"]
)
def test_sync_batch_norm_on_a_cpu(layers, toy_config, load, free_port, tmp_path, monkeypatch):
    """A distributed run of one process, in this process."""
    environment = dict(
        RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = toy_config(changes=f'{layers}\ntrain_cfg = dict(by_epoch=True, max_epochs=2)')
    work_dir = tmp_path / 'work'
    try:
        cli.train(
            [str(config), '--work-dir', str(work_dir), '--no-validate', '--launcher', 'pytorch']
        )
        assert torch.distributed.get_backend() == 'gloo'
    finally:
        torch.distributed.destroy_process_group()
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'SyncBatchNorm does not run on a CPU: each process normalises by its own batch.' in log
    assert load(work_dir / 'epoch_2.pth')['meta']['iter'] == 12


@pytest.mark.parametrize(
    'script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh']
)
def test_usage(script, run):
    result = run(script, 'config.py', check=False)
    assert result.returncode == 2
    assert f'Usage: {script} ' in result.stdout


@pytest.mark.parametrize('task', ['train', 'test'])
def test_torchrun(task, run, repository, tmp_path):
    """A stand-in for torchrun prints its arguments, one in a line."""
    fake = tmp_path / 'bin' / 'torchrun'
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    checkpoint = ['my weights.pth'] if task == 'test' else []
    result = run(
        f'dist_{task}.sh', 'a b.py', *checkpoint, 4, '--cfg-options', 'a.b="c d"',
        PATH=f'{fake.parent}:/usr/bin:/bin', NNODES='3', NODE_RANK='2', MASTER_ADDR='m0', PORT='7',
    )  # fmt: skip
    assert result.stdout.splitlines() == [
        '--nnodes=3', '--node_rank=2', '--master_addr=m0', '--master_port=7', '--nproc_per_node=4',
        str(repository / 'tools' / f'{task}.py'), 'a b.py', *checkpoint,
        '--launcher', 'pytorch', '--cfg-options', 'a.b="c d"',
    ]  # fmt: skip


@pytest.mark.parametrize('task', ['train', 'test'])
def test_slurm(task, run, repository, tmp_path, monkeypatch):
    """A stand-in for srun prints its arguments, one in a line."""
    fake = tmp_path / 'bin' / 'srun'
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{fake.parent}:/usr/bin:/bin')
    last = 'my weights.pth' if task == 'test' else 'my work dir'
    result = run(
        f'slurm_{task}.sh', 'gpu part', 'job', 'a b.py', last, '--cfg-options', 'a.b="c d"',
        GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='7', SRUN_ARGS='--exclude=n1 --time=60',
    )  # fmt: skip
    assert result.stdout.splitlines() == [
        '-p', 'gpu part', '--job-name=job', '--gres=gpu:4', '--ntasks=16', '--ntasks-per-node=4',
        '--cpus-per-task=7', '--kill-on-bad-exit=1', '--exclude=n1', '--time=60',
        'python', '-u', str(repository / 'tools' / f'{task}.py'), 'a b.py',
        *(['--work-dir', last] if task == 'train' else [last]),
        '--launcher', 'slurm', '--cfg-options', 'a.b="c d"',
    ]  # fmt: skip
