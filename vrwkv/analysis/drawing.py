"""What the tools print, write and draw with: one look for every table and picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

#: Okabe and Ito's colours, which the colour-blind tell apart; in this order, black first.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#F0E442')
#: Markers beside the colours, for prints in black and white.
MARKERS = 'osD^vPX*'

_STYLE = {
    'figure.facecolor': 'white',
    'figure.dpi': 120,
    'figure.constrained_layout.use': True,
    'font.size': 11,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e0e0e0',
    'axes.prop_cycle': mpl.cycler(color=COLOURS[1:]),
    'legend.frameon': False,
}


@contextmanager
def picture(path: str | os.PathLike, *args, **kwargs) -> Iterator[tuple[mpl.figure.Figure, object]]:
    """Make a figure in the common style and write it at the end.

    Args:
        path: The PNG file to write; its folder is made.
        *args: As for :func:`matplotlib.pyplot.subplots`.
        **kwargs: Likewise.

    Yields:
        The figure and its axes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        # A figure of its own needs no window system, unlike pyplot's current one.
        with plt.ioff():
            fig, axes = plt.subplots(*args, **kwargs)
        try:
            yield fig, axes
            fig.savefig(path)
        finally:
            plt.close(fig)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write rows as a Markdown table, in columns that line up.

    Args:
        header: Names of the columns.
        rows: Cells, already rounded; None is printed as a dash.

    Returns:
        The lines of the table: text to the left, numbers to the right.
    """
    cells = [['-' if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        return f'| {" | ".join(padded)} |'

    rule = [
        '-' * (width - 1) + ':' if number else '-' * width
        for width, number in zip(widths, right, strict=True)
    ]
    return '\n'.join([line(header), line(rule), *map(line, cells)])


def _is_number(cell: str) -> bool:
    return cell == '-' or cell.lstrip('+-').partition(' ')[0].replace('.', '', 1).isdigit()


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write results with the machine and the versions that they were got with.

    Args:
        path: The file; its folder is made.
        content: What JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content, environment=environment()), indent=2) + '\n')


def environment() -> dict[str, object]:
    """Describe the machine and the versions, for the record beside figures."""
    return dict(
        processor=_processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        torch=torch.__version__,
    )


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    if info.is_file():
        for entry in info.read_text().splitlines():
            if entry.startswith('model name'):
                return entry.partition(':')[2].strip()
    return platform.processor() or platform.machine()
