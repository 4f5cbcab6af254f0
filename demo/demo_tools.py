"""Functions that the demos share: train, test, draw and report, and skip what is done."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

import vrwkv.engine  # noqa: F401 (configs that inherit from a library's, under onedl too)

ROOT = Path(__file__).resolve().parents[1]

# Settings that a training must share with the one that it continues.
SETTINGS = (
    'model.backbone',
    'model.neck',
    *(f'model.{kind}head' for kind in ('', 'rpn_', 'roi_', 'decode_', 'auxiliary_')),
    'optim_wrapper',
    'param_scheduler',
)

# Colours that colour-blind readers can distinguish.
RIGHT, WRONG = '#00876c', '#d1495b'


def make_parser(documentation: str, work_dir: str) -> argparse.ArgumentParser:
    """Create a parser with the options of every demo.

    Args:
        documentation: The demo's docstring; its first line becomes the description.
        work_dir: Default of ``--work-dir`` in words.
    """
    parser = argparse.ArgumentParser(description=documentation.partition('\n')[0])
    parser.add_argument('--work-dir', type=Path, help=f'default: {work_dir} in the checkout')
    parser.add_argument(
        '--verbose', action='store_true', help='show everything that the log files contain'
    )
    return parser


def run_tool(name: str, *args: str | os.PathLike) -> None:
    """Run a script of ``tools/`` in the root of the checkout, where data paths start."""
    subprocess.run([sys.executable, ROOT / 'tools' / name, *args], cwd=ROOT, check=True)


def is_newer(path: Path, than: Path) -> bool:
    """Return whether a file exists and was written after another."""
    return path.is_file() and path.stat().st_mtime >= than.stat().st_mtime


def write_config(source: Path, out: Path, options: dict) -> Path:
    """Write a config with some settings changed."""
    cfg = Config.fromfile(source)
    cfg.merge_from_dict(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(out)
    return out


def train(config: Path, work_dir: Path, verbose: bool = False) -> Path:
    """Train unless that is done, and return the last checkpoint.

    Raises:
        SystemExit: If the folder contains a training with other settings.
    """
    cfg = Config.fromfile(config)
    used = work_dir / config.name
    if used.is_file():
        before = Config.fromfile(used)
        for key in SETTINGS:
            if _lookup(before, key) != _lookup(cfg, key):
                raise SystemExit(
                    f'{work_dir} holds a training with another {key} than {config} has now: '
                    'remove the folder, or name another one with --work-dir'
                )
    iters = cfg.train_cfg.get('max_iters')
    name = f'iter_{iters}' if iters else f'epoch_{cfg.train_cfg.max_epochs}'
    checkpoint = work_dir / f'{name}.pth'
    if not checkpoint.is_file():
        print(f'Training {config.stem} in {work_dir}', flush=True)
        options = ['--verbose'] if verbose else []
        run_tool('train.py', config, '--work-dir', work_dir, '--resume', *options)
    return checkpoint


def _lookup(cfg: Config, key: str) -> object:
    for part in key.split('.'):
        cfg = cfg.get(part, {})
    return cfg


def measure(config: Path, checkpoint: Path, verbose: bool = False) -> dict[str, float]:
    """Test the checkpoint unless that is done, and return all metrics by name."""
    out = checkpoint.with_name('metrics.json')
    if not is_newer(out, checkpoint):
        print(f'Testing {checkpoint}', flush=True)
        options = ['--work-dir', checkpoint.parent / 'test', '--out', out, '--out-item', 'metrics']
        options += ['--verbose'] if verbose else []
        run_tool('test.py', config, checkpoint, *options)
    return json.loads(out.read_text())


@contextmanager
def output_to(log: Path, verbose: bool = False) -> Iterator[None]:
    """Append the output of this process and of its libraries to a log file.

    Args:
        log: The file; its folder exists.
        verbose: Whether to leave the output on the screen.
    """
    if verbose:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open('ab') as file:
        # Descriptors, not sys.stdout: loggers and compiled code keep their own references.
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def run_demo(
    documentation: str,
    default: Path,
    write_data: Callable[[Config, Path], object],
    draw: Callable[[Path, Path, Path, dict[str, float], Path], None],
    picture: str,
    report: Callable[[Config, dict[str, float]], str],
    next_step: str,
) -> None:
    """Write data, train, test, draw and report, from the command line.

    Args:
        documentation: The demo's docstring.
        default: The default config.
        write_data: Writes the data of a config into a folder, unless that is done.
        draw: Draws a picture from a config, its checkpoint, the folder of its data and its metrics
            into a file.
        picture: Name of that file.
        report: Formats the metrics.
        next_step: Advice for what to do next.
    """
    parser = make_parser(documentation, 'work_dirs/<name of the config>')
    parser.add_argument(
        'config', nargs='?', default=default, type=Path, help='default: %(default)s'
    )
    args = parser.parse_args()
    config = args.config.resolve()
    work_dir = (args.work_dir or ROOT / 'work_dirs' / config.stem).resolve()
    cfg = Config.fromfile(config)
    data_root = ROOT / cfg.test_dataloader.dataset.data_root

    print(f'Data: {data_root}', flush=True)
    write_data(cfg, data_root)
    checkpoint = train(config, work_dir, args.verbose)
    metrics = measure(config, checkpoint, args.verbose)
    drawn = work_dir / picture
    if not is_newer(drawn, checkpoint):
        print(f'Drawing {drawn}', flush=True)
        with output_to(work_dir / 'drawing.log', args.verbose):
            draw(config, checkpoint, data_root, metrics, drawn)
    log = max(work_dir.glob('2*/*.log'), default=work_dir)  # folders are named by date
    print(f"""
{report(cfg, metrics)}
  picture     {drawn}
  checkpoint  {checkpoint}
  log         {log}
{next_step}""")
