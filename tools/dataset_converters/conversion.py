"""What the converters share: their command line, and COCO's format."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


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
