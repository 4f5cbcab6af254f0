"""A Runner that also works on several CPU processes, and resumes from the last whole checkpoint."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint import CheckpointError
from .patches import without_cuda_set_device
from .screen import QuietScreen

_CHECKPOINT_NAME = re.compile(r'(?!best_).*_(\d+)\.pth')


@RUNNERS.register_module()
class VRWKVRunner(Runner):
    """mmengine's :class:`Runner` with these differences, used by the tools.

    * Without a GPU a distributed run uses gloo and plain CPU modules. mmengine calls
      ``torch.cuda.set_device`` and gives DDP a GPU index whatever the machine.
    * ``resume=True`` without ``load_from``, and ``resume='auto'`` (which keeps ``load_from`` for
      the case that there is nothing to resume), continue from the newest whole checkpoint of a
      training in ``work_dir``, with the seed recorded in it unless the config sets one. Each
      checkpoint is read once, and nothing of a file without the state of a training is loaded.
    * ``auto_scale_lr`` counts the batches that the optimizer wrapper accumulates.
    * ``compile`` in the config (True, or options of :func:`torch.compile`) compiles the backbone.
      mmengine compiles the whole training step, and Dynamo cannot trace the optimizer's part of it.
    """

    #: Path and content of the checkpoint to resume from, until it is loaded.
    _training: tuple[str, dict] | None = None
    #: Why other checkpoints in ``work_dir`` were rejected; None before the search.
    _rejected: list[str] | None = None

    def setup_env(self, env_cfg: dict) -> None:
        """Set up multi-processing and the process group.

        Args:
            env_cfg (dict): As for :class:`mmengine.runner.Runner`.
        """
        if self.distributed and get_device() == 'cpu':
            env_cfg.setdefault('dist_cfg', {})['backend'] = 'gloo'
            with without_cuda_set_device():
                super().setup_env(env_cfg)
        else:
            super().setup_env(env_cfg)

    def set_randomness(self, seed: int | None, *args, **kwargs) -> None:
        """Set the random seed: the given one, else the one of the run to resume, else a new one.

        Args:
            seed (int, optional): The seed.
            *args: As for :class:`mmengine.runner.Runner`.
            **kwargs: As for :class:`mmengine.runner.Runner`.
        """
        # mmengine restores the seed when it resumes, which is too late for the samplers.
        if seed is None and self.cfg.get('resume'):
            load_from = self.cfg.get('load_from')
            if load_from is None or self.cfg.resume == 'auto':
                self._find_training()
            else:
                self._training = (load_from, _read_training(load_from))
            if self._training is not None:
                seed = self._training[1]['meta'].get('seed')
        super().set_randomness(seed, *args, **kwargs)

    def _find_training(self) -> None:
        """Read the newest whole checkpoint of a training in ``work_dir``, if there is one.

        Raises:
            CheckpointError: If the processes find different ones, each on the disk of its machine.
        """
        self._rejected = []
        for path in find_checkpoints(self.work_dir):
            try:
                self._training = (str(path), _read_training(str(path)))
            except (CheckpointError, FileNotFoundError) as error:
                self._rejected.append(
                    f'Cannot resume from {path}; trying the previous checkpoint. {error}'
                )
            else:
                break
        found = all_gather_object(self._training and Path(self._training[0]).name)
        if len(set(found)) > 1:
            raise CheckpointError(
                f'the processes found different checkpoints in {self.work_dir}, by rank: {found}. '
                'Resume in a folder that all machines share, or copy the newest checkpoint to each '
                'and name it: --resume CHECKPOINT'
            )

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Build the logger, whose screen is quiet within :class:`.screen.QuietScreen`.

        Args:
            *args: As for :class:`mmengine.runner.Runner`.
            **kwargs: As for :class:`mmengine.runner.Runner`.

        Returns:
            MMLogger: The logger.
        """
        logger = super().build_logger(*args, **kwargs)
        QuietScreen.attach(logger)
        return logger

    def build_param_scheduler(self, scheduler: dict | list) -> dict | list:
        """Build the schedules of learning rates and momenta.

        Args:
            scheduler: As for :class:`mmengine.runner.Runner`.

        Raises:
            ValueError: If a schedule ends before it begins, as where the training is too short.
        """
        try:
            return super().build_param_scheduler(scheduler)
        except ValueError as error:
            if 'end should be larger than begin' not in str(error):
                raise
            raise ValueError(
                f'a schedule of param_scheduler ends before it begins ({error}). Without an end it '
                f'ends with the training, after {self.max_iters} iterations: train longer '
                '(train_cfg), or lower its begin and the end of the warm-up'
            ) from error

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

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict | None = None) -> None:
        """Scale the learning rate by the number of samples in a step over the base batch size.

        mmengine forgets that a step may accumulate several batches.

        Args:
            optim_wrapper (OptimWrapper): The optimizer wrapper.
            auto_scale_lr (dict, optional): As for :class:`mmengine.runner.Runner`.
        """
        if auto_scale_lr is None or not auto_scale_lr.get('enable'):
            return
        several = isinstance(optim_wrapper, OptimWrapperDict)
        for wrapper in optim_wrapper.values() if several else [optim_wrapper]:
            counts = wrapper._accumulative_counts
            if counts > 1:
                self.logger.info(
                    f'A step accumulates {counts} batches: dividing the base batch size '
                    f'{auto_scale_lr["base_batch_size"]} by {counts}.'
                )
            base = auto_scale_lr['base_batch_size'] / counts
            super().scale_lr(wrapper, {**auto_scale_lr, 'base_batch_size': base})

    def load_or_resume(self) -> None:
        """Resume from the newest whole checkpoint, or load what the config asks for."""
        automatic = self._resume == 'auto' or (self._resume and self._load_from is None)
        if self._has_loaded or not automatic:
            super().load_or_resume()
            return
        if self._rejected is None:  # the seed was given
            self._find_training()
        for message in self._rejected:
            self.logger.warning(message)
        if self._training is not None:
            self.logger.info(f'Resuming from {self._training[0]}.')
            self.resume(self._training[0])
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
            CheckpointError: If it cannot be read, or holds weights without the state of a training.
                Nothing has been loaded then.
        """
        if self._training is None or self._training[0] != filename:
            self._training = (filename, _read_training(filename))
        runtime_info = self._training[1]['message_hub'].get('runtime_info', {})
        super().resume(filename, *args, **kwargs)
        self._warn_of_ended_schedule(filename, runtime_info)

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module.', ''),),
    ) -> dict:
        """Load a checkpoint, without reading it again where :meth:`resume` has read it.

        Args:
            filename (str): Its path or URL.
            map_location (str or callable): As for :func:`torch.load`.
            strict (bool): Whether the names of all parameters must match.
            revise_keys (list): Pairs of a pattern and its replacement in the names of parameters.

        Returns:
            dict: The checkpoint.
        """
        if self._training is not None and self._training[0] == filename:
            (_, checkpoint), self._training = self._training, None
        else:
            checkpoint = CheckpointLoader.load_checkpoint(filename, map_location)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        # Without a logger mmengine prints which weights do not fit, and the quiet screen hides it.
        _load_checkpoint_to_model(
            model, checkpoint, strict, logger=self.logger, revise_keys=list(revise_keys)
        )
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def _maybe_compile(self, target: str) -> None:
        """Compile the backbone if the config asks for it, in place of the model's ``target``."""
        options = self.cfg.get('compile')
        if options is None or options is False:
            return
        backbones = [
            module
            for name, module in self.model.named_modules()
            if name.rpartition('.')[2] == 'backbone'
        ]
        if not backbones or not (options is True or isinstance(options, dict)):
            raise ValueError(
                f'compile={options!r} compiles the backbone of a model, and this '
                f'{type(self.model).__name__} has {len(backbones)}. compile takes True, False or '
                "the options of torch.compile, such as dict(mode='max-autotune')."
            )
        for backbone in backbones:
            backbone.compile(**({} if options is True else options))
        self.logger.info('Compiling the backbone: the first iterations take longer.')

    def val(self) -> dict:
        """Validate, as :meth:`mmengine.runner.Runner.val`, with the compiled backbone."""
        self._maybe_compile('val_step')
        return super().val()

    def test(self) -> dict:
        """Test, as :meth:`mmengine.runner.Runner.test`, with the compiled backbone."""
        self._maybe_compile('test_step')
        return super().test()

    def _warn_of_ended_schedule(self, filename: str, runtime_info: dict) -> None:
        """Warn if the schedules, restored from the checkpoint, were made for a shorter training."""
        schedulers = self.param_schedulers or []
        if isinstance(schedulers, dict):
            schedulers = [scheduler for group in schedulers.values() for scheduler in group]
        for scheduler in schedulers:
            unit = 'epochs' if scheduler.by_epoch else 'iters'
            planned, now = runtime_info.get(f'max_{unit}'), getattr(self, f'max_{unit}')
            if planned and planned < now and scheduler.begin < planned <= scheduler.end:
                self.logger.warning(
                    f'{filename} comes from a training with max_{unit}={planned}; this one has '
                    f'max_{unit}={now}. Resuming restores {type(scheduler).__name__} as it was '
                    f'made for {planned} and ignores param_scheduler in the config: the '
                    f'{scheduler.param_name} keeps its last value from there on. For another '
                    'schedule, start a new training from these weights: set '
                    f'load_from={filename}, param_scheduler, optim_wrapper.optimizer.lr and '
                    f'train_cfg.max_{unit}, and leave out --resume.'
                )
                return


def _read_training(filename: str) -> dict:
    """Read a checkpoint that holds the state of a training, not weights alone.

    Args:
        filename: Its path or URL.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: If it holds no such state.
    """
    # The runner itself says what it loads.
    checkpoint = CheckpointLoader.load_checkpoint(filename, map_location='cpu', logger='silent')
    meta = checkpoint.get('meta') or {}
    missing = [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
    missing += [key for key in ('message_hub', 'optimizer') if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"Checkpoint '{filename}' holds weights but no state of a training to resume (no "
            f'{", ".join(missing)}). To start a training from these weights, use --cfg-options '
            'load_from=... without --resume.'
        )
    return checkpoint


def find_checkpoints(work_dir: str | Path) -> list[Path]:
    """List the checkpoints that a training may resume from, the best candidate first.

    Args:
        work_dir (str | Path): The folder of the training, with its ``last_checkpoint``.

    Returns:
        list[Path]: The one that ``last_checkpoint`` names, then those beside it by falling age.
        They need not be whole.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / 'last_checkpoint'
    named = Path(pointer.read_text('utf-8').strip() or '.') if pointer.is_file() else None
    # The folder may be a copy of the one that the pointer names: its own files come first.
    folders = [work_dir] if named is None else [work_dir, named.parent]
    found = []
    for folder in dict.fromkeys(folders):
        if named is not None:
            found.append(folder / named.name)
        if folder.is_dir():
            others = [
                (path.stat().st_mtime, int(match[1]), path)
                for path in folder.iterdir()
                if (match := _CHECKPOINT_NAME.fullmatch(path.name))
            ]
            found += [path for _, _, path in sorted(others, reverse=True)]
    return list(dict.fromkeys(path for path in found if path.is_file()))
