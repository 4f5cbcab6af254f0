"""A hook that compares a model with its data before a run."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.models.decode_heads import Mask2FormerHead, MaskFormerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import HOOKS
from torch.utils.data import DataLoader

# The last two are mmdet's heads with mmseg's losses.
HEADS = (BaseDecodeHead, MaskFormerHead, Mask2FormerHead)


@HOOKS.register_module()
class NumClassCheckHook(Hook):
    """Require that each head has as many classes as the data set, like mmdet's hook of this name.

    With fewer classes a loss fails at some label, on a GPU without its number. With more classes
    mmseg's ``IoUMetric`` leaves out predictions of the classes that the data set lacks.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training set.

        Args:
            runner: The runner.

        Raises:
            ValueError: If a head has another number of classes.
        """
        _check(runner, runner.train_dataloader)

    def before_val(self, runner: Runner) -> None:
        """Check the validation set, as :meth:`before_train`."""
        _check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check the test set, as :meth:`before_train`."""
        _check(runner, runner.test_dataloader)


def _check(runner: Runner, loader: DataLoader) -> None:
    dataset = loader.dataset
    classes = dataset.metainfo.get('classes')
    if classes is None:
        return
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for name, head in model.named_modules():
        if isinstance(head, HEADS) and head.num_classes != len(classes):
            raise ValueError(
                f'the model has num_classes={head.num_classes} in its {name}, but the '
                f'{type(dataset).__name__} has {len(classes)} classes ({", ".join(classes[:5])}'
                f'{", ..." if len(classes) > 5 else ""}): set model.{name}.num_classes='
                f"{len(classes)}, or the data set's metainfo.classes"
            )
