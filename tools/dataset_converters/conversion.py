"""Functions that the converters share: write a folder whole or not at all, write COCO's format."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name when the block ends without an error.

    Raises:
        FileExistsError: If ``path`` exists.
    """
    if path.exists():
        raise FileExistsError(f'{path} exists: remove it, or name another folder')
    part = path.with_name(path.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    part.replace(path)


def write_coco(path: Path, classes: list[dict], images: list[dict], objects: list[dict]) -> None:
    """Write an annotation file of COCO's format; images and objects are numbered from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = [dict(id=number, **entry) for number, entry in enumerate(objects, 1)]
    path.write_text(json.dumps(dict(images=images, annotations=objects, categories=classes)))


def run(convert: Callable[[Path, Path], None], documentation: str) -> None:
    """Run a converter from the command line: ``SRC DST``.

    Args:
        convert: Takes both folders.
        documentation: The script's docstring.

    Raises:
        SystemExit: If the source is not as expected.
    """
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('src', type=Path, metavar='SRC', help='the folder as downloaded')
    parser.add_argument('dst', type=Path, metavar='DST', help='the folder to write')
    args = parser.parse_args()
    try:
        convert(args.src, args.dst)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
