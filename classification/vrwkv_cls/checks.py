"""Checks that images, labels, classes and heads fit each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from mmpretrain.registry import HOOKS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from vrwkv.weights import require_head_fit


def require_classes_fit(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse the weights of a classifier with other classes; see :func:`require_head_fit`.

    Args:
        model: Any model; only a classifier's head is checked.
        state_dict: The weights.

    Raises:
        CheckpointError: If the model is a classifier whose head has another shape.
    """
    head = getattr(model, 'head', None)
    if isinstance(head, (ClsHead, MultiLabelClsHead)):
        require_head_fit(head, state_dict)


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Raise an error if data set and head disagree on the classes.

    mmpretrain's ``ClassNumCheckHook`` does not look into wrapped data sets, nor at the labels. A
    label outside the classes is a bare index error in training, and counts as a mistake in
    validation.

    Raises:
        ValueError: If a data set has another number of classes than the head, or other classes
            than the training set, or a label lies outside the classes.
    """

    trained_on = None

    def before_run(self, runner: Runner) -> None:
        """Note the number of classes."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.num_classes = getattr(getattr(model, 'head', None), 'num_classes', None)
        preprocessor = getattr(model, 'data_preprocessor', None)
        expected = getattr(preprocessor, 'num_classes', None)
        if None not in (expected, self.num_classes) and expected != self.num_classes:
            raise ValueError(
                f'the head has num_classes={self.num_classes}, but data_preprocessor has '
                f'num_classes={expected}: set both to the same number'
            )

    def before_train(self, runner: Runner) -> None:
        """Check the training set."""
        self.trained_on = self._check_classes(runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Check the validation set."""
        self._check_classes(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test set."""
        self._check_classes(runner.test_dataloader.dataset)

    def _check_classes(self, dataset: torch.utils.data.Dataset) -> list[str] | None:
        classes = getattr(dataset, 'metainfo', {}).get('classes')  # wrappers pass it on
        if None in (classes, self.num_classes):
            return None
        classes = list(classes)
        if len(classes) != self.num_classes:
            raise ValueError(
                f'the data set has {len(classes)} classes ({", ".join(classes[:3])}, ...), but '
                f'the model has num_classes={self.num_classes}: set num_classes of model.head and '
                'data_preprocessor, or add the class folders that are missing'
            )
        if self.trained_on not in (None, classes):
            others = sorted(set(classes) ^ set(self.trained_on)) or 'in another order'
            raise ValueError(
                f'the training and the validation set have different classes ({others}), so their '
                'labels would mean different things: name both sets of folders alike'
            )
        return classes

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = 'train'
    ) -> None:
        """Check the labels of a batch, in training, validation and tests."""
        if self.num_classes is None or not isinstance(data_batch, dict):
            return
        samples = list(data_batch.get('data_samples') or ())
        while samples:
            sample = samples.pop()
            if isinstance(sample, list | tuple):  # versions of one image, with --tta
                samples.extend(sample)
            elif problem := label_problem(sample, self.num_classes):
                raise ValueError(problem)


def label_problem(sample: DataSample, num_classes: int) -> str | None:
    """Describe labels of a sample that a head of some classes cannot have.

    Args:
        sample: The sample, on the CPU, where this takes microseconds.
        num_classes: Number of classes of the head.

    Returns:
        The problem; None if there is none.
    """
    path = sample.get('img_path')
    label, score = sample.get('gt_label'), sample.get('gt_score')
    if label is not None and not all(0 <= i < num_classes for i in label.flatten().tolist()):
        return (
            f'{path} has the label {label.tolist()}, but the model has num_classes={num_classes}: '
            f'labels go from 0 to {num_classes - 1}. Correct the annotation, or num_classes'
        )
    if score is not None and score.shape[-1] != num_classes:
        return (
            f'{path} has scores of {score.shape[-1]} classes, but the model has '
            f'num_classes={num_classes}: give one score for each class'
        )
    return None
