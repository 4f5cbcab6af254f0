"""A Runner that also works on several CPU processes, and resumes from the last whole checkpoint."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import CheckpointError, read_checkpoint

_CHECKPOINT_NAME = re.compile(r'(?!best_).*_(\d+)\.pth')


@RUNNERS.register_module()
class VRWKVRunner(Runner):
    """mmengine's :class:`Runner` with two differences, used by the tools.

    * Without a GPU a distributed run uses gloo and plain CPU modules. mmengine calls
      ``torch.cuda.set_device`` and gives DDP a GPU index whatever the machine.
    * ``resume=True`` without ``load_from``, and ``resume='auto'`` (which keeps ``load_from`` for
      the case that there is nothing to resume), go on from the newest checkpoint in ``work_dir``
      that is whole, with the seed recorded in it unless the config sets one.
    """

    def setup_env(self, env_cfg: dict) -> None:
        """Set up multi-processing and the process group.

        Args:
            env_cfg (dict): As for :class:`mmengine.runner.Runner`.
        """
        if self.distributed and get_device() == 'cpu':
            env_cfg.setdefault('dist_cfg', {})['backend'] = 'gloo'
            with _no_cuda_set_device():
                super().setup_env(env_cfg)
        else:
            super().setup_env(env_cfg)

    def set_randomness(self, seed: int | None, *args, **kwargs) -> None:
        """Set the random seed: the one given, else the one of the run to resume, else a new one.

        Args:
            seed (int, optional): The seed.
            *args: As for :class:`mmengine.runner.Runner`.
            **kwargs: As for :class:`mmengine.runner.Runner`.
        """
        if seed is None:
            seed = self._recorded_seed()
        super().set_randomness(seed, *args, **kwargs)

    def _recorded_seed(self) -> int | None:
        # Samplers are built before mmengine resumes, so its own restoring of the seed is
        # too late for them.
        resume, load_from = self.cfg.get('resume'), self.cfg.get('load_from')
        if not resume:
            return None
        explicit = load_from is not None and resume != 'auto'
        for path in [load_from] if explicit else find_checkpoints(self.work_dir):
            try:
                return read_checkpoint(path, 'cpu').get('meta', {}).get('seed')
            except (CheckpointError, FileNotFoundError):
                continue  # reported when it is resumed from
        return None

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training.

        Args:
            model_wrapper_cfg (dict, optional): As for :class:`mmengine.runner.Runner`.
            model (nn.Module): The model.

        Returns:
            nn.Module: The model, wrapped where the run is distributed.
        """
        if self.distributed and get_device() == 'cpu':
            layers = [type(module) for module in model.modules()]
            if self.cfg.get('sync_bn') or nn.SyncBatchNorm in layers:
                self.logger.warning(
                    'SyncBatchNorm does not run on a CPU: each process normalises by its own batch.'
                )
                self.cfg.sync_bn = None
                model = revert_sync_batchnorm(model)
            if model_wrapper_cfg is None:  # mmengine's defaults
                model_wrapper_cfg = dict(
                    type='MMDistributedDataParallel',
                    broadcast_buffers=False,
                    find_unused_parameters=self.cfg.get('find_unused_parameters', False),
                )
            wrapper = model_wrapper_cfg.get('type', 'MMDistributedDataParallel')
            if isinstance(wrapper, str):
                wrapper = MODEL_WRAPPERS.get(wrapper)
            if issubclass(wrapper, DistributedDataParallel):
                model_wrapper_cfg.setdefault('device_ids', None)
        return super().wrap_model(model_wrapper_cfg, model)

    def load_or_resume(self) -> None:
        """Resume from the newest whole checkpoint, or load what the config asks for."""
        automatic = self._resume == 'auto' or (self._resume and self._load_from is None)
        if self._has_loaded or not automatic:
            super().load_or_resume()
            return
        for path in find_checkpoints(self.work_dir):
            try:
                self.resume(str(path))
            except (CheckpointError, FileNotFoundError) as error:
                self.logger.warning(
                    f'Cannot resume from {path}, so tries the one before it. {error}'
                )
            else:
                self.logger.info(f'Resumed from {path}.')
                return
        start = (
            'from scratch' if self._load_from is None else f'from the weights in {self._load_from}'
        )
        self.logger.warning(
            f'There is no whole checkpoint to resume from in {self.work_dir}: '
            f'training starts {start}.'
        )
        self._resume = False
        super().load_or_resume()

    def resume(self, filename: str, *args, **kwargs) -> None:
        """Resume from a checkpoint.

        Args:
            filename (str): Its path or URL.
            *args: As for :class:`mmengine.runner.Runner`.
            **kwargs: As for :class:`mmengine.runner.Runner`.

        Raises:
            CheckpointError: If it cannot be read or holds weights only.
        """
        try:
            super().resume(filename, *args, **kwargs)
        except KeyError as error:
            if error.args[0] not in ('meta', 'epoch', 'iter', 'message_hub'):
                raise
            raise CheckpointError(
                f"Checkpoint '{filename}' holds weights but no state of a training to resume "
                f'(no {error}). To start a training from these weights, use --cfg-options '
                'load_from=... without --resume.'
            ) from error


def find_checkpoints(work_dir: str | Path) -> list[Path]:
    """List the checkpoints that a training may resume from, the best candidate first.

    Args:
        work_dir (str | Path): The folder of the training, with its ``last_checkpoint``.

    Returns:
        list[Path]: The one that ``last_checkpoint`` names, then those beside it by falling age.
        They need not be whole.
    """
    folders = [Path(work_dir)]
    found = []
    pointer = folders[0] / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if named:
        found = [Path(named), folders[0] / Path(named).name]  # the latter if work_dir was moved
        folders.insert(0, found[0].parent)
    others = [
        (path.stat().st_mtime, int(match[1]), path)
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if (match := _CHECKPOINT_NAME.fullmatch(path.name))
    ]
    found += [path for _, _, path in sorted(others, reverse=True)]
    return list(dict.fromkeys(path for path in found if path.is_file()))


@contextmanager
def _no_cuda_set_device() -> Iterator[None]:
    """Make ``torch.cuda.set_device``, which all of mmengine's launchers call, do nothing."""
    original = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = original
