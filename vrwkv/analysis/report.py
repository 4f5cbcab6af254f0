"""Tables, files and machine facts of the analysis tools."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as a Markdown table with aligned columns.

    Args:
        header: Names of the columns.
        rows: Cells, already rounded; None becomes a dash.

    Returns:
        The table: text on the left of its column, numbers on the right.
    """
    cells = [['-' if cell is None else str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [bool(cells) and all(map(_is_number, column[1:])) for column in columns]

    def line(row: Sequence[str]) -> str:
        pad = [str.rjust if number else str.ljust for number in right]
        return f'| {" | ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True))} |'

    rule = [
        '-' * (w - 1) + (':' if number else '-') for w, number in zip(widths, right, strict=True)
    ]
    return '\n'.join([line(header), line(rule), *map(line, cells)])


def _is_number(cell: str) -> bool:
    return cell == '-' or cell.lstrip('+-').partition(' ')[0].replace('.', '', 1).isdigit()


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Name files by their stems, with as many parent folders as tell them apart.

    Args:
        paths: Paths or addresses of files.

    Returns:
        A name for each; equal paths get a number.
    """
    parts = [Path(path).with_suffix('').parts for path in paths]
    names = ['/'.join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = [
            '/'.join(part[-length:]) if names.count(name) > 1 else name
            for part, name in zip(parts, names, strict=True)
        ]
    return [
        f'{name} ({names[:i].count(name) + 1})' if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write results together with the machine and the versions that produced them.

    Args:
        path: The file; its folder is created.
        content: The results, of types that JSON has.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content, environment=machine()), indent=2) + '\n')


def machine() -> dict[str, object]:
    """Describe the machine and the versions of Python and torch."""
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
