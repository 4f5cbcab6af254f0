"""Names and files of results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vrwkv_ops.benchmarking import default_device, describe_environment, write_json


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


def write_results(path: str | os.PathLike, content: dict) -> None:
    """Write results together with the machine and the versions that produced them.

    Args:
        path: The file; its folder is created.
        content: The results, of types that JSON has.
    """
    write_json(path, dict(content, environment=describe_environment(default_device())))
