"""Text files with a byte order mark, which Windows' editors write at the start of UTF-8."""

from __future__ import annotations

from io import TextIOBase
from types import ModuleType


def open_without_mark(
    file: str, mode: str = 'r', *args, encoding: str | None = None, **kwargs
) -> TextIOBase:
    """Open a file as :func:`open` does; text is read as UTF-8 without a byte order mark."""
    if 'b' not in mode and 'r' in mode and encoding in (None, 'utf-8'):
        encoding = 'utf-8-sig'
    return open(file, mode, *args, encoding=encoding, **kwargs)


def skip_byte_order_marks(*modules: ModuleType) -> None:
    """Make modules skip a byte order mark in the text files that they read.

    mmengine (up to 0.10.7) and pycocotools (up to 2.0.11) keep it: the first class of a list, or
    the first image, gets a name that no file has, and JSON is an error.

    Args:
        *modules: Modules that call ``open``.
    """
    for module in modules:
        module.open = open_without_mark
