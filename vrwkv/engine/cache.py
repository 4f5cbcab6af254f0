"""Files that addresses name, from a cache or downloaded."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from .download import AbsentError, DownloadError, download

#: OpenMMLab ends file names with the first digits of the SHA-256. Digits alone would be a date.
_HASH_IN_NAME = re.compile(r'-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$')
_HUB = 'https://huggingface.co'
#: Path of a file on the Hugging Face Hub: repository, revision and file.
_HUB_PATH = re.compile(r'/([^/]+/[^/]+)/resolve/([^/]+)/([^?#]+)')


def fetch(
    url: str,
    folder: str | os.PathLike | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Path:
    """Return the path of a file that an address names; download the file unless a cache has it.

    Files on the Hugging Face Hub go through ``huggingface_hub`` where it is installed, and come
    from the mirror that ``HF_ENDPOINT`` names.

    Args:
        url: An ``http://`` or ``https://`` address. If the file's name ends with ``-`` and the
            first digits of its SHA-256, they are checked.
        folder: The cache for other files; None for PyTorch's.
        name: The file's name in that cache; None for its name in the address.
        progress: Whether to show a progress bar.

    Returns:
        The path of the file.

    Raises:
        AbsentError: If the server has no such file.
        DownloadError: If the file cannot be downloaded.
    """
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / (name or Path(urlparse(url).path).name)
    if path.is_file():
        return path
    try:
        mirror = os.environ.get('HF_ENDPOINT', _HUB).rstrip('/')
        host = next((host for host in (_HUB, mirror) if url.startswith(f'{host}/')), None)
        if host is not None:
            url = mirror + url.removeprefix(host)
            on_hub = _HUB_PATH.match(url.removeprefix(mirror))
            if on_hub and find_spec('huggingface_hub'):
                return _fetch_from_hub(mirror, *on_hub.groups())
        digest = _HASH_IN_NAME.search(path.name)
        download(url, path, digest and digest[1], progress)
    except (OSError, RuntimeError, ValueError) as error:
        kind = AbsentError if isinstance(error, AbsentError) else DownloadError
        raise kind(
            f'Cannot download checkpoint {url}: {error}. Download it by other means and give its '
            f'path instead, or save it as {path}.'
        ) from error
    return path


def _fetch_from_hub(endpoint: str, repository: str, revision: str, file: str) -> Path:
    """Return the path of a file in huggingface_hub's cache; download it if it has changed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(
            repository, unquote(file), revision=unquote(revision), endpoint=endpoint
        )
    except LocalEntryNotFoundError as error:
        host = urlparse(endpoint).hostname
        raise DownloadError(f'there is no connection to {host}') from error
    except EntryNotFoundError as error:
        raise AbsentError(f'{repository} has no file {file}') from error
    except Exception as error:  # the errors of its HTTP library differ from release to release
        reason = ' '.join(str(error).split('\n\n')[0].split()).rstrip('.')
        raise DownloadError(f'huggingface_hub says: {reason}') from error
    return Path(path)
