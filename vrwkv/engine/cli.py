"""The command lines of ``tools/train.py`` and ``tools/test.py``, for every task."""

import argparse
import logging
import os
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.fileio import dump
from mmengine.logging import print_log
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from .runner import VRWKVRunner

# What draws predictions in each library: the hook's switch and the place of its output folder.
_VISUALIZATION = {
    'VisualizationHook': ('enable', 'out_dir'),
    'DetVisualizationHook': ('draw', 'test_out_dir'),
    'SegVisualizationHook': ('draw', None),  # mmseg writes where its visualizer says
}


def train(argv: list[str] | None = None) -> None:
    """Train a model as ``tools/train.py`` does.

    Args:
        argv (list[str], optional): The arguments. Defaults to those of the process.
    """
    parser = _parser('Train a model of any task, as its config says.')
    parser.add_argument(
        '--work-dir', help='folder of logs and checkpoints (default: work_dirs/<config>)'
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint; without a value, from the last whole one in --work-dir',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train in mixed precision (bfloat16 where there is no GPU)',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over the one that the config was made for',
    )
    args = _parse(parser, argv)
    cfg = _load_config(args)

    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume == 'auto':
        cfg.resume = 'auto'
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}: '
                'the batch size over all GPUs that its learning rate was made for.'
            )
        cfg.auto_scale_lr.enable = True
    _set_precision(cfg, args.amp)
    make_resumable(cfg)
    build_runner(cfg).train()


def test(argv: list[str] | None = None) -> None:
    """Evaluate a model as ``tools/test.py`` does.

    Args:
        argv (list[str], optional): The arguments. Defaults to those of the process.
    """
    parser = _parser('Evaluate a model of any task on the test set of its config.')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--work-dir', help='folder of logs (default: work_dirs/<config>)')
    parser.add_argument(
        '--out',
        help='file for predictions (.pkl) or metrics (.json, .yaml, .pkl); for mmseg also a folder '
        'for label maps',
    )
    parser.add_argument(
        '--out-item',
        choices=['pred', 'metrics'],
        default='pred',
        help='what --out gets (default: pred)',
    )
    parser.add_argument('--amp', action='store_true', help='evaluate in mixed precision')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder to draw predictions into')
    parser.add_argument('--interval', type=int, help='draw each n-th sample only')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show shows a sample'
    )
    parser.add_argument(
        '--tta', action='store_true', help='augment at test time as the config says'
    )
    args = _parse(parser, argv)
    cfg = _load_config(args)

    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir:
        _draw_predictions(cfg, args)
    if args.tta:
        _augment_test(cfg, args.config)

    writer = None
    if args.out and args.out_item == 'pred':
        writer = _prediction_writer(cfg, args.out)
    runner = build_runner(cfg)
    if writer:
        runner.test_evaluator.metrics.append(writer)
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        dump(metrics, args.out)


def make_resumable(cfg: Config) -> None:
    """Have a training write whole checkpoints and draw its random numbers by epoch.

    Puts :class:`~vrwkv.engine.AtomicCheckpointHook` in the place of a plain ``CheckpointHook`` and
    adds :class:`~vrwkv.engine.EpochSeedHook`.

    Args:
        cfg (Config): The config, changed in place.
    """
    hooks = cfg.setdefault('default_hooks', {})
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint is not None and _type_name(checkpoint) == 'CheckpointHook':
        checkpoint['type'] = 'AtomicCheckpointHook'
    custom = cfg.get('custom_hooks') or []
    if not any(_type_name(hook) == 'EpochSeedHook' for hook in custom):
        cfg.custom_hooks = [*custom, dict(type='EpochSeedHook')]


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change settings of the config: a.b=1, a.0.b=1 (lists), "a=[1,2]", "a=[(1,2),(3,4)]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # Set by torch.distributed.launch; torchrun sets the environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def _load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply what training and testing have in common."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    complete_loaders(cfg)
    return cfg


def complete_loaders(cfg: Config) -> None:
    """Give data loaders what the libraries leave to their own tools to add.

    Args:
        cfg (Config): The config, changed in place.
    """
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        if cfg.get('default_scope') == 'mmpretrain':  # its configs leave these to its tools
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', split != 'test')
        if loader.get('num_workers', 0) == 0:  # PyTorch refuses them without workers
            loader.pop('persistent_workers', None)
            loader.pop('prefetch_factor', None)


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner, a :class:`VRWKVRunner` unless it names another.

    Args:
        cfg (Config): The config.

    Returns:
        Runner: The runner.
    """
    return RUNNERS.build(cfg) if 'runner_type' in cfg else VRWKVRunner.from_cfg(cfg)


def _type_name(cfg: dict) -> str:
    """Name of a config's type, which may be a string or a class."""
    return getattr(cfg.get('type'), '__name__', cfg.get('type'))


def _set_precision(cfg: Config, amp: bool) -> None:
    """Choose the optimizer wrapper for ``--amp``, and for mixed precision where there is no GPU."""
    wrapper = cfg.optim_wrapper
    kind = _type_name(wrapper) or 'OptimWrapper'
    if amp and kind not in ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        raise ValueError(
            f"--amp takes the place of optim_wrapper type 'OptimWrapper', but the config has "
            f"'{kind}'. Choose mixed precision in the config instead."
        )
    if not amp and kind != 'AmpOptimWrapper':
        return
    if torch.cuda.is_available():
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    else:
        if kind == 'AmpOptimWrapper':
            print_log(
                'There is no GPU: trains in bfloat16 on the CPU (CPUAmpOptimWrapper).',
                logger='current',
                level=logging.WARNING,
            )
        wrapper.type = 'CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None or _type_name(hook) not in _VISUALIZATION:
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the config, with a type '
            f'out of {list(_VISUALIZATION)}, but it is {hook}.'
        )
    if args.tta and _type_name(hook) == 'VisualizationHook':
        raise ValueError('mmpretrain cannot draw the merged predictions of --tta: draw without it.')
    switch, folder = _VISUALIZATION[_type_name(hook)]
    hook[switch] = True
    if args.interval is not None:
        hook.interval = args.interval
    elif folder == 'out_dir':
        hook.interval = 1
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if args.show_dir and folder:
        hook[folder] = args.show_dir
    elif args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def _augment_test(cfg: Config, config_path: str) -> None:
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            f'--tta needs tta_model and tta_pipeline in the config, and {config_path} has not.'
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _prediction_writer(cfg: Config, out: str) -> DumpResults | None:
    """Make what writes predictions to ``out``; None if the config's own metric was told to."""
    if out.endswith(('.pkl', '.pickle')):
        mmdet = cfg.get('default_scope') == 'mmdet'  # whose masks need encoding
        return METRICS.build(
            dict(type='mmdet.DumpDetResults' if mmdet else 'DumpResults', out_file_path=out)
        )
    if cfg.get('default_scope') == 'mmseg' and not Path(out).suffix:
        cfg.test_evaluator.output_dir = out
        cfg.test_evaluator.keep_results = True
        return None
    raise ValueError(
        f"--out '{out}' must end in .pkl for predictions. For metrics, add --out-item metrics."
    )
