"""A training of a second, for configs in these tests: data, model, metric, accidents."""

import os
import random
import signal
import warnings

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import nn

CLASSES, FEATURES = 3, 8


@DATASETS.register_module()
class ToyDataset(torch.utils.data.Dataset):
    """Points around class centres, augmented with all three random generators."""

    metainfo = dict(classes=('a', 'b', 'c'))  # noqa: RUF012 (as mmengine has it)

    def __init__(self, size=24, augment=True, repeats=1):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(size) % CLASSES
        centres = 2 * torch.randn(CLASSES, FEATURES, generator=generator)
        points = centres[self.labels] + torch.randn(size, FEATURES, generator=generator)
        self.labels, self.points = self.labels.repeat(repeats), points.repeat(repeats, 1)
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        point = self.points[index]
        if self.augment:
            point = (
                point * random.uniform(0.5, 1)
                + np.random.uniform(0, 0.1)
                + torch.rand(FEATURES) / 10
            )
        return dict(inputs=point, labels=self.labels[index])


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self, dropout=0.2, norm='BatchNorm1d'):
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 16)
        self.norm = getattr(nn, norm)(16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, CLASSES)

    def init_weights(self):
        for module in (self.hidden, self.head):
            nn.init.normal_(module.weight, std=0.2)

    def forward(self, inputs, labels, mode='tensor'):
        logits = self.head(self.dropout(self.norm(self.hidden(inputs)).relu()))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return [dict(score=score, label=label) for score, label in zip(logits, labels, strict=True)]


class ToyBackbone(nn.Linear):
    def forward(self, points):  # Dynamo leaves a module of PyTorch's own alone
        return nn.functional.linear(points, self.weight, self.bias)


@MODELS.register_module()
class ToyBackboneModel(ToyModel):
    """The toy model with its first layer as backbone."""

    def __init__(self):
        super().__init__(dropout=0.0)
        del self.hidden
        self.backbone = ToyBackbone(FEATURES, 16)

    @property
    def hidden(self):
        return self.backbone


BACKEND = None


@torch._dynamo.register_backend
def toy_counter(graph, inputs):
    """Compile with ``BACKEND``, which counts."""
    return BACKEND(graph, inputs)


@METRICS.register_module()
class ToyMetric(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results += [
            (-nn.functional.log_softmax(s['score'].double(), 0)[s['label']]).item()
            for s in data_samples
        ]

    def compute_metrics(self, results):
        return dict(likelihood=-float(np.mean(results)), count=len(results))


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class DieInEpoch(Hook):
    """The process is killed after ``iteration``."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            die()


@HOOKS.register_module()
class DieInSave(Hook):
    """The process is killed while the data of the ``saves``-th checkpoint go to disk."""

    def __init__(self, saves):
        self.saves = saves

    def before_save_checkpoint(self, runner, checkpoint):
        self.saves -= 1
        if self.saves == 0:
            os.fsync = die


@HOOKS.register_module()
class Talk(Hook):
    """Warns, prints and logs."""

    def before_train(self, runner):
        warnings.warn('old', stacklevel=1)
        print('a print')  # noqa: T201
        runner.logger.warning('mind this')
        runner.logger.warning('this is deprecated')
        runner.logger.error('broken')


@HOOKS.register_module()
class RecordBatches(Hook):
    """Keeps the inputs of each epoch."""

    epochs: list = []  # noqa: RUF012

    def before_train_epoch(self, runner):
        self.epochs.append([])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.epochs[-1].append(data_batch['inputs'].clone())
