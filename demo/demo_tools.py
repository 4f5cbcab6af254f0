"""Functions that the demos share: train, test, draw and report, and skip what is done."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

import vrwkv.engine  # noqa: F401 (configs that inherit from a library's, under onedl too)

ROOT = Path(__file__).resolve().parents[1]
LOG = 'demo.log'  # in the working folder: all output of tools and libraries

if '--verbose' not in sys.argv:
    warnings.simplefilter('ignore')  # the libraries warn when they are imported

# Settings that a training must share with the one that it continues.
SETTINGS = (
    'model.backbone',
    'model.neck',
    *(f'model.{kind}head' for kind in ('', 'rpn_', 'roi_', 'decode_', 'auxiliary_')),
    'optim_wrapper',
    'param_scheduler',
    'train_cfg.max_epochs',
    'train_cfg.max_iters',
)
# Settings that a test must share with the one whose result stands for it.
TEST_SETTINGS = ('test_dataloader.dataset', 'test_evaluator')
# How to name metrics.
METRICS = {
    'accuracy/top1': 'top-1 (%)',
    'coco/bbox_mAP_50': 'AP50 of boxes',
    'coco/bbox_mAP': 'AP of boxes',
    'coco/segm_mAP_50': 'AP50 of masks',
    'coco/segm_mAP': 'AP of masks',
    'mIoU': 'mIoU (%)',
    'aAcc': 'pixels (%)',
}

MODELS = ('vrwkv-nano', 'vrwkv6-nano')

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
        '--verbose', action='store_true', help=f'show everything, instead of writing it to {LOG}'
    )
    return parser


def run_tool(name: str, *args: str | os.PathLike, log: Path | None = None) -> None:
    """Run a script of ``tools/`` in the root of the checkout, where data paths start.

    Args:
        name: The script.
        *args: Its arguments.
        log: File to append the output to; the screen then shows one line of progress. None shows
            all that the log of the script contains.

    Raises:
        SystemExit: If the script fails, or the user interrupts it.
    """
    command = [sys.executable, ROOT / 'tools' / name, *args]
    if log is None:
        if code := subprocess.run([*command, '--verbose'], cwd=ROOT).returncode:
            raise SystemExit(f'tools/{name} failed with exit status {code}')
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    lines = []
    with log.open('a') as file, subprocess.Popen(command, cwd=ROOT, **output) as process:
        progress = Progress()
        try:
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                progress.update(line)
        except KeyboardInterrupt:
            process.wait()  # it got the signal, too
            raise SystemExit('\nInterrupted. The same command continues.') from None
        progress.end()
    if process.returncode:
        tail = ''.join(lines[-20:])
        raise SystemExit(f'{tail}tools/{name} failed; all of its output is in {log}')


class Progress:
    """A line with iteration, loss, accuracy and remaining time, read from mmengine's log.

    A terminal shows one line that changes; a file gets a line every few seconds.

    Args:
        seconds: Time between two lines of a file.
    """

    TRAIN = re.compile(r'(Epoch|Iter)\(train\) +(\[.*?\])  .*?eta: (\S+) .*? loss: ([\d.]+)')
    METRIC = re.compile(r'\(val\).*?(accuracy/top1|coco/bbox_mAP_50|mIoU): +([\d.]+)')

    def __init__(self, seconds: float = 10) -> None:
        self.seconds, self.shown_at = seconds, -seconds
        self.text = self.metric = ''

    def update(self, line: str) -> None:
        """Read a line of the log, and show the progress if it is one about training."""
        if found := self.METRIC.search(line):
            self.metric = f'  {found[1]} {found[2]}'
        if found := self.TRAIN.search(line):
            self.text = f'  {found[1]} {found[2]}  loss {found[4]}{self.metric}  left {found[3]}'
            if sys.stdout.isatty():
                print(f'\r\x1b[K{self.text}', end='', flush=True)
            elif time.monotonic() - self.shown_at >= self.seconds:
                self.shown_at, text, self.text = time.monotonic(), self.text, ''
                print(text, flush=True)

    def end(self) -> None:
        """Show the last state."""
        if self.text:
            print('' if sys.stdout.isatty() else self.text, flush=True)


def backbone_name(config: Path) -> str:
    """Return the name of a config's backbone, for pictures."""
    return Config.fromfile(config).model.backbone.type.replace('Adapter', '-Adapter')


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
    if used.is_file() and (key := _first_difference(Config.fromfile(used), cfg, SETTINGS)):
        raise SystemExit(
            f'{work_dir} holds a training with another {key} than {config} has now: '
            'remove the folder, or name another one with --work-dir'
        )
    iters = cfg.train_cfg.get('max_iters')
    name = f'iter_{iters}' if iters else f'epoch_{cfg.train_cfg.max_epochs}'
    checkpoint = work_dir / f'{name}.pth'
    if not checkpoint.is_file():
        print(f'Training {config.stem} in {work_dir}', flush=True)
        log = None if verbose else work_dir / LOG
        run_tool('train.py', config, '--work-dir', work_dir, '--resume', log=log)
    return checkpoint


def _first_difference(before: Config, after: Config, keys: tuple[str, ...]) -> str | None:
    """Return the first of some settings in which two configs differ."""

    def lookup(cfg: Config, key: str) -> object:
        for part in key.split('.'):
            cfg = cfg.get(part, {})
        return cfg

    return next((key for key in keys if lookup(before, key) != lookup(after, key)), None)


def measure(config: Path, checkpoint: Path, verbose: bool = False) -> dict[str, float]:
    """Test the checkpoint unless that is done, and return all metrics by name."""
    out, folder = checkpoint.with_name('metrics.json'), checkpoint.with_name('test')
    used = folder / config.name
    if (
        not is_newer(out, checkpoint)
        or not used.is_file()
        or _first_difference(Config.fromfile(used), Config.fromfile(config), TEST_SETTINGS)
    ):
        print(f'Testing {checkpoint}', flush=True)
        options = ['--work-dir', folder, '--out', out, '--out-item', 'metrics']
        log = None if verbose else checkpoint.with_name(LOG)
        run_tool('test.py', config, checkpoint, *options, log=log)
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


def data_options(cfg: Config, key: str) -> dict:
    """Return what a config says about the data that a demo writes.

    Raises:
        SystemExit: If it says nothing: its data are others.
    """
    if not cfg.get(key):
        raise SystemExit(
            f'error: {cfg.filename} has no {key}: this demo takes configs of the data that it '
            'writes. Use tools/train.py for others'
        )
    return cfg[key]


def run_demo(
    documentation: str,
    default: Path,
    write_data: Callable[[Config, Path], object],
    draw: Callable[[Path, Path, Path, dict[str, float], Path], None],
    picture: str,
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
        next_step: Advice for what to do next.
    """
    parser = make_parser(documentation, 'work_dirs/<name of the config>')
    parser.add_argument('config', nargs='?', type=Path, help=f'default: {default}')
    parser.add_argument(
        '--model',
        choices=MODELS,
        help=f'the model of the default config: {MODELS[0]} (default) or {MODELS[1]}',
    )
    args = parser.parse_args()
    if args.config and args.model:
        parser.error('give a config or --model, not both')
    name = default.name.replace('vrwkv-', (args.model or MODELS[0]).removesuffix('nano'))
    config = (args.config or default.with_name(name)).resolve()
    if not config.is_file():
        parser.error(f'config {config} does not exist')
    work_dir = (args.work_dir or ROOT / 'work_dirs' / config.stem).resolve()
    cfg = Config.fromfile(config)
    data_root = ROOT / cfg.test_dataloader.dataset.data_root

    print(f'Data: {data_root}', flush=True)
    try:
        write_data(cfg, data_root)
    except FileExistsError as error:
        raise SystemExit(f'error: {error}') from error
    checkpoint = train(config, work_dir, args.verbose)
    metrics = measure(config, checkpoint, args.verbose)
    drawn = work_dir / picture
    if not is_newer(drawn, checkpoint):
        print(f'Drawing {drawn}', flush=True)
        with output_to(work_dir / LOG, args.verbose):
            draw(config, checkpoint, data_root, metrics, drawn)
    log = max(work_dir.glob('2*/*.log'), default=work_dir)  # folders are named by date
    results = [f'  {name}  {metrics[key]:.4g}' for key, name in METRICS.items() if key in metrics]
    print('', 'On the test images:', *results, sep='\n')
    print(f"""\
  picture     {drawn}
  checkpoint  {checkpoint}
  log         {log}
{next_step}""")
