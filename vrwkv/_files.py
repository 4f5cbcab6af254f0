"""Writing files that are complete or absent."""

import os
from contextlib import suppress
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
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
