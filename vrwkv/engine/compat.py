"""What the OpenMMLab packages and their onedl forks need to work here; active on import.

* Checkpoints. mmengine 0.10 calls ``torch.load`` with its default ``weights_only``: from PyTorch
  2.6 on that refuses mmengine's own checkpoints, before it runs whatever code a file holds.
  onedl-mmengine retries a refused file with ``weights_only=False``, and both download with
  ``weights_only=False``. So the loaders below take the places of mmengine's: they read safely under
  every PyTorch version, and explain a bad file. Everything that loads through mmengine gets them:
  ``load_from``, ``resume``, ``init_cfg=dict(type='Pretrained', ...)`` and the libraries'
  inferencers. (``pavi://`` keeps mmengine's own, since its client is not public.)
* ``_base_ = 'mmseg::...'``. mmengine looks for a distribution called ``mmsegmentation``, which
  under onedl is called ``onedl-mmsegmentation``. The import name finds either.

A script that calls ``mmengine.Config.fromfile`` itself imports ``vrwkv_cls`` (or ``vrwkv.engine``)
first.
"""

import io
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import get_file_backend
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

from .checkpoint import CheckpointError, allow_harmless_globals, read_checkpoint
from .download import download

# OpenMMLab ends file names with the first digits of the SHA-256. Digits alone would be a date.
_HASH_IN_NAME = re.compile(r'-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$')


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Load a checkpoint from a path; see :func:`vrwkv.engine.read_checkpoint`."""
    return read_checkpoint(filename, map_location)


@CheckpointLoader.register_scheme(prefixes=[r'(\S+\:)?s3://', r'(\S+\:)?petrel://'], force=True)
def load_from_ceph(filename: str, map_location: Any = None, backend: str = 'petrel') -> dict:
    """Load a checkpoint from an object store; see :func:`vrwkv.engine.read_checkpoint`."""
    store = get_file_backend(filename, backend_args={'backend': backend})
    return read_checkpoint(io.BytesIO(store.get(filename)), map_location, filename)


def load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
    **kwargs,
) -> dict:
    """Download a checkpoint, unless PyTorch's cache holds it, and read it safely.

    See :func:`vrwkv.engine.download.download` for what happens on a poor connection.

    Takes the place of ``torch.hub.load_state_dict_from_url`` in mmengine, with the same arguments,
    so that ``http(s)://``, ``torchvision://``, ``open-mmlab://`` and ``mmcls://`` all come this
    way.

    Raises:
        CheckpointError: If the download fails or its SHA-256 is not the one in its name.
    """
    folder = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints'))
    path = folder / (kwargs.get('file_name') or Path(urlparse(url).path).name)
    if not path.is_file():
        digest = _HASH_IN_NAME.search(path.name)
        try:
            download(url, path, digest and digest[1], progress)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f'Cannot download checkpoint {url}: {error}. Download it by other means and give '
                f'its path instead, or save it as {path}.'
            ) from error
    return read_checkpoint(path, map_location)


def _is_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


allow_harmless_globals()
mmengine_checkpoint.load_url = load_url
if hasattr(mmengine_checkpoint, '_safe_torch_load'):  # onedl-mmengine
    mmengine_checkpoint._safe_torch_load = read_checkpoint

for module, package in list(MODULE2PACKAGE.items()):
    if module != package and _is_distribution(f'onedl-{package}') and not _is_distribution(package):
        MODULE2PACKAGE[module] = module
