"""Writing files and folders that are complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file completely or not at all, whenever the process or the machine stops.

    The data is written to ``<name>.tmp``, flushed to disk and renamed. The temporary name is
    always the same, so that a later call replaces the file of a killed process.

    Args:
        path: The file. Its folder is created where it is missing.
        data: The content.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        with temporary.open('wb') as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # Python names no file when writing fails
        raise
    with suppress(OSError):  # Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to fill, which gets its name when the block ends without an error.

    Until then it is ``<name>.part``; a later call replaces the folder of a killed process.

    Args:
        path: The folder.

    Yields:
        The folder to fill.

    Raises:
        FileExistsError: If ``path`` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f'{path} exists: remove it, or name another folder')
    part = path.with_name(f'{path.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    part.replace(path)
