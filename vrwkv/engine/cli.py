"""The command lines of ``tools/train.py`` and ``tools/test.py``, for every task."""

import argparse
import ast
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from .outputs import LabelMapsHook
from .runner import VRWKVRunner
from .screen import QuietScreen

# What starts the processes of each launcher, and a variable that it sets.
_LAUNCHERS = {
    'pytorch': ('torchrun: use tools/dist_train.sh or dist_test.sh', 'RANK'),
    'slurm': ('srun: use tools/slurm_train.sh or slurm_test.sh', 'SLURM_PROCID'),
    'mpi': ("Open MPI's mpirun", 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


class ConfigOption(DictAction):
    """mmengine's ``DictAction`` that also reads dicts, such as ``hooks=[dict(type='A',b=1)]``.

    mmengine's recurses without end on these.
    """

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        try:
            tree = ast.parse(val.strip(), mode='eval')
            nodes = list(ast.walk(tree))
            # mmengine would remove the spaces of quoted strings in lists and make them numbers.
            is_quoted = val.strip().startswith(('(', '[')) and any(
                isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes
            )
            if is_quoted or any(isinstance(node, (ast.Call, ast.Dict)) for node in nodes):
                return ast.literal_eval(_Dicts().visit(tree))
        except (SyntaxError, ValueError):
            pass  # a string without quotes
        text = val.strip(' \'"')
        if ',' not in text and not text.startswith(('(', '[')):
            # mmengine would remove the spaces of a path, too.
            return DictAction._parse_int_float_bool(text)
        return DictAction._parse_iterable(val)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        """Add options to the namespace; an option that cannot be read ends the program."""
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (AssertionError, RecursionError, ValueError):
                parser.error(
                    f'argument {option_string}: cannot read {value!r}. Write KEY=VALUE, where '
                    "VALUE is a number, a string, a list such as [1,2] or dict(type='A',b=1)"
                )


class _Dicts(ast.NodeTransformer):
    """Turn ``dict(a=1)`` into ``{'a': 1}`` and names into strings."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict' or node.args:
            return node
        keys = [ast.Constant(keyword.arg) for keyword in node.keywords]
        return ast.Dict(keys, [self.visit(keyword.value) for keyword in node.keywords])

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(DictAction._parse_int_float_bool(ast.unparse(node)))

    visit_Attribute = visit_Name  # noqa: N815


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
    try:
        with QuietScreen(args.verbose):
            _train(args)
    except KeyboardInterrupt:
        parser.exit(130, 'Interrupted. The same command with --resume continues.\n')


def _train(args: argparse.Namespace) -> None:
    cfg = _load_config(args)

    _require(cfg, args.config, 'model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.resume == 'auto':
        cfg.resume = 'auto'
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError(
                f'--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in {args.config}: '
                'the batch size over all GPUs that its learning rate was made for.'
            )
        cfg.auto_scale_lr.enable = True
    _set_precision(cfg, args.amp)
    make_resumable(cfg)
    runner = build_runner(cfg)
    places = f'Checkpoints: {runner.work_dir}. Log: {runner.logger.log_file}'
    runner.logger.info(f'Training {args.config}. {places}')
    runner.train()
    runner.logger.info(f'Trained {args.config}. {places}')


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
        '--tta',
        action='store_true',
        help='augment at test time, as the config says or, for classifiers, by a flip',
    )
    args = _parse(parser, argv)
    with QuietScreen(args.verbose):
        _test(args)


def _test(args: argparse.Namespace) -> None:
    cfg = _load_config(args)

    _require(cfg, args.config, 'model', 'test_dataloader', 'test_cfg', 'test_evaluator')
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
    elif args.out and not args.out.endswith(('.json', '.yaml', '.yml', '.pkl', '.pickle')):
        raise ValueError(f"--out '{args.out}' must end in .json, .yaml or .pkl for metrics.")
    runner = build_runner(cfg)
    if isinstance(writer, Hook):
        runner.register_hook(writer)
    elif writer:
        runner.test_evaluator.metrics.append(METRICS.build(writer))
    runner.logger.info(
        f'Testing {args.checkpoint} with {args.config}. Log: {runner.logger.log_file}'
    )
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and is_main_process():
        dump(metrics, args.out)
    for kind, place in (('Output', args.out), ('Pictures', args.show_dir)):
        if place:
            runner.logger.info(f'{kind}: {place}')


def make_resumable(cfg: Config) -> None:
    """Have a training write whole checkpoints and draw its random numbers by epoch.

    Puts :class:`~vrwkv.engine.AtomicCheckpointHook` in the place of a plain ``CheckpointHook`` and
    adds :class:`~vrwkv.engine.EpochSeedHook`.

    Args:
        cfg (Config): The config, changed in place.
    """
    cfg.default_hooks = cfg.get('default_hooks') or {}
    cfg.default_hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    checkpoint = cfg.default_hooks.checkpoint
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
        action=ConfigOption,
        metavar='KEY=VALUE',
        help='change settings of the config: a.b=1, a.0.b=1 (lists), "a=[(1,2),(3,4)]", '
        '"a=[dict(type=\'B\',c=1)]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', *_LAUNCHERS],
        default='none',
        help='job launcher',
    )
    parser.add_argument(
        '--verbose', action='store_true', help='show on the screen all that the log file gets'
    )
    # Set by torch.distributed.launch; torchrun sets the environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    starter, variable = _LAUNCHERS.get(args.launcher, ('', ''))
    if starter and variable not in os.environ:
        parser.error(f'--launcher {args.launcher} needs {starter}')
    # mmengine's MPI launcher does not set LOCAL_RANK, and its DDP reads it.
    rank = os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', str(args.local_rank))
    os.environ.setdefault('LOCAL_RANK', rank)
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


def _require(cfg: Config, path: str, *sections: str) -> None:
    """Require sections of a config that its command needs."""
    missing = [section for section in sections if cfg.get(section) is None]
    if missing:
        raise ValueError(
            f'{path} has no {", ".join(missing)}: this command needs {", ".join(sections)} in the '
            'config.'
            + (' A config of OpenMMLab 1.x? Start from one in configs/.' if 'data' in cfg else '')
        )


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
    """Return the name of a config's type, a class or a string, without a scope."""
    kind = cfg.get('type')
    return getattr(kind, '__name__', kind and kind.rpartition('.')[2])


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
                'There is no GPU: training in bfloat16 on the CPU (CPUAmpOptimWrapper).',
                logger='current',
                level=logging.WARNING,
            )
        wrapper.type = 'CPUAmpOptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = (cfg.get('default_hooks') or {}).get('visualization') or {}
    kind = _type_name(hook)
    if kind == 'VisualizationHook':  # mmpretrain
        if args.tta:
            raise ValueError(
                'mmpretrain cannot draw the merged predictions of --tta: draw without it.'
            )
        hook.enable = True
    elif kind in ('DetVisualizationHook', 'SegVisualizationHook'):
        hook.draw = True
        if 'LoadRaster' in str(cfg.test_dataloader):  # of vrwkv_seg
            hook.type = 'RasterVisualizationHook'
    else:
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the config, with the type '
            'VisualizationHook (mmpretrain), DetVisualizationHook or SegVisualizationHook, got '
            f'{hook or None}.'
        )
    if args.interval is not None and args.interval < 1:
        raise ValueError(f'--interval must be at least 1, got {args.interval}.')
    hook.interval = args.interval or 1
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if args.show_dir:
        cfg.default_hooks.visualization = dict(
            type='PicturesHook', hook=hook, out_dir=args.show_dir, interval=hook.interval
        )


def _augment_test(cfg: Config, config_path: str) -> None:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    if cfg.get('default_scope') == 'mmpretrain':  # the default of its own test.py
        *load, pack = dataset.pipeline
        flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        merged = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA'))
        cfg.setdefault('tta_pipeline', [*load, merged])
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            f'--tta needs tta_model and tta_pipeline in the config, and {config_path} does not set '
            'both. configs/_base_/datasets/ade20k_512x512.py is an example.'
        )
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _prediction_writer(cfg: Config, out: str) -> dict | LabelMapsHook:
    """Return a metric's config or a hook that writes predictions to ``out``."""
    if out.endswith(('.pkl', '.pickle')):
        mmdet = cfg.get('default_scope') == 'mmdet'  # its masks need encoding
        kind = 'mmdet.DumpDetResults' if mmdet else 'mmengine.DumpResults'
        return dict(type=kind, out_file_path=out)
    if cfg.get('default_scope') == 'mmseg' and not Path(out).suffix:
        return LabelMapsHook(out)
    raise ValueError(
        f"--out '{out}' must end in .pkl for predictions. For metrics, add --out-item metrics."
    )
