"""Hooks that make a killed training resume exactly: random state per epoch, whole checkpoints."""

import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop

from .._files import write_atomically


@register_backend('atomic')
class AtomicLocalBackend(LocalBackend):
    """Local files that are complete or absent (:func:`vrwkv._files.write_atomically`)."""

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write ``obj`` to ``filepath``."""
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        """Write the text ``obj`` to ``filepath``."""
        self.put(obj.encode(encoding), filepath)


class _DeferredRemoval:
    """A file backend that only notes in ``removed`` what it is told to remove."""

    def __init__(self, backend: LocalBackend):
        self._backend = backend
        self.removed: list[str] = []
        self.remove = self.rmtree = self.removed.append

    def __getattr__(self, name: str):
        return getattr(self._backend, name)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, such that a whole checkpoint is there at every moment.

    mmengine writes checkpoints in place, and removes the outdated one (``max_keep_ckpts``,
    ``save_best``) before it writes the new one: a process killed in between leaves none. Here a
    checkpoint is written under a temporary name and renamed, then ``last_checkpoint`` likewise, and
    only then is the outdated one removed. Files outside the training's own folder, such as the best
    checkpoint of the run that it was resumed from, are never removed. ``tools/train.py`` replaces a
    plain ``CheckpointHook`` by this hook.

    Args:
        *args, **kwargs: As for :class:`mmengine.hooks.CheckpointHook`. With ``backend_args`` or
            ``file_client_args`` (a remote store) checkpoints are written as these say.
    """

    def __init__(self, *args, **kwargs):
        if kwargs.get('backend_args') is None and kwargs.get('file_client_args') is None:
            kwargs['backend_args'] = dict(backend='atomic')
        super().__init__(*args, **kwargs)

    def before_train(self, runner) -> None:
        """Find the folder for checkpoints, and the best one so far if it lies there.

        Args:
            runner (Runner): The runner of the training process.
        """
        super().before_train(runner)
        if self.save_best is None:
            return
        # A resumed state names the files of the run that saved it, in a folder of their own.
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = self._own(self.best_ckpt_path)
        else:
            self.best_ckpt_path_dict = {
                key: self._own(path) for key, path in self.best_ckpt_path_dict.items()
            }

    def _own(self, path: str | None) -> str | None:
        """Return the file of this name in the training's own folder, or None."""
        path = path and self.file_backend.join_path(self.out_dir, Path(path).name)
        return path if path and self.file_backend.exists(path) else None

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        # As in mmengine, but saving comes before removing.
        outdated = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(self.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))
        if outdated is not None:
            self._remove(self.file_backend.join_path(self.out_dir, outdated))

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        backend = self.file_backend
        self.file_backend = deferred = _DeferredRemoval(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = {
            getattr(self, 'best_ckpt_path', None),
            *getattr(self, 'best_ckpt_path_dict', {}).values(),
        }
        for path in deferred.removed:
            if path not in best:  # a resumed run may write the same name again
                self._remove(path)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # DeepSpeed saves folders
            self.file_backend.rmtree(path)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Derive all random state of an epoch from the seed, the epoch and the rank.

    An epoch then does not depend on earlier ones, and a training resumed at its start continues
    exactly as the unbroken one. Python's, numpy's and PyTorch's generators (the GPU's too) are
    seeded, and so are the workers of the training data loader: mmengine seeds those alike in each
    epoch, and persistent ones carry their state over, so they are started anew here. A
    ``worker_init_fn`` of the config's own is left alone. ``tools/train.py`` adds this hook to every
    config.

    For the same reason no accumulated gradient is carried into the next epoch: with
    ``accumulative_counts`` the last iterations of an epoch make a step of their own, of their mean
    gradient, even if they are fewer.

    An iteration-based training has one epoch: it draws the same numbers from its start, but does
    not resume bit for bit.
    """

    priority = 'HIGHEST'

    def before_train_epoch(self, runner) -> None:
        """Seed the generators of this process and of the workers to come; accumulate anew.

        Args:
            runner (Runner): The runner of the training process.
        """
        seed = _derive_seed(runner.seed, runner.epoch, get_rank())
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

        loader = runner.train_dataloader
        init = loader.worker_init_fn
        if isinstance(init, partial) and init.func is worker_init_fn:
            loader.worker_init_fn = partial(init, seed=_derive_seed(runner.seed, runner.epoch))
        if loader.persistent_workers:
            loader._iterator = None

        wrapper = runner.optim_wrapper
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and (
            getattr(wrapper, '_accumulative_counts', 1) > 1
        ):
            wrapper.initialize_count_status(runner.model, 0, len(loader))


def _derive_seed(*numbers: int) -> int:
    """Mix non-negative numbers into 31 bits: numpy takes 32, and worker numbers are added."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1
