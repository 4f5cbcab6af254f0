"""Toy configs, and running the tools on them."""

import os
import textwrap
from pathlib import Path

import pytest
import torch

CONFIG = """
default_scope = 'mmengine'
custom_imports = dict(imports=['vrwkv.engine', 'toy'], allow_failed_imports=False)
model = dict(type='ToyModel')
loader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, collate_fn=dict(type='default_collate'))
train_dataloader = dict(
    dataset=dict(type='ToyDataset'), sampler=dict(type='DefaultSampler', shuffle=True), **loader)
val_dataloader = dict(
    dataset=dict(type='ToyDataset', augment=False),
    sampler=dict(type='DefaultSampler', shuffle=False), **loader)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='ToyMetric')
val_cfg = test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=4)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.05, weight_decay=0.05),
    clip_grad=dict(max_norm=5))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-3, by_epoch=True, begin=1)]
default_hooks = dict(
    checkpoint=dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=2, save_best='toy/likelihood',
        rule='greater'))
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
del loader
"""


@pytest.fixture(autouse=True)
def toy_on_path(monkeypatch, training_environment):
    """Let configs import the module ``toy``, also in child processes."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')


@pytest.fixture(autouse=True)
def one_thread():
    """Compute here as the child processes do: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy_config(tmp_path):
    """Write the toy config, with changes. mmengine tells runs apart by its name and the second."""

    def write(name='toy', changes=''):
        path = tmp_path / f'{tmp_path.name}-{name}.py'
        path.write_text(CONFIG + textwrap.dedent(changes))
        return path

    return write
