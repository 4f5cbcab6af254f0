"""Every function of mmengine, mmpretrain, mmdet and mmseg that this project replaces.

Each function here makes one replacement, when it is called for the first time. :mod:`vrwkv.engine`
calls those that all tasks need, the task packages call the others in their ``__init__``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ..checkpoint import CheckpointError, allow_harmless_globals, read_checkpoint
from .cache import fetch
from .download import DownloadError

# --- mmengine -----------------------------------------------------------------------------------


@cache
def read_checkpoints_safely() -> None:
    """Make mmengine load checkpoints with :func:`vrwkv.engine.read_checkpoint`.

    mmengine 0.10 calls ``torch.load`` with its default of ``weights_only``: before PyTorch 2.6 a
    file's code is run; since then mmengine's own checkpoints are refused. onedl-mmengine 0.10 loads
    a refused file again without that protection, and both download without it.
    Everything that loads through mmengine is covered: ``load_from``, ``resume``,
    ``init_cfg=dict(type='Pretrained', ...)`` and the libraries' inferencers; ``pavi://`` is not,
    because its client is not public. This may go when mmengine loads with ``weights_only=True``,
    allows the types in its own files and checks downloads.
    """
    from mmengine.runner import CheckpointLoader, checkpoint

    allow_harmless_globals()
    register = CheckpointLoader.register_scheme
    register(prefixes='', loader=load_from_local, force=True)
    stores = [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    register(prefixes=stores, loader=load_from_ceph, force=True)
    checkpoint.load_url = load_url
    if hasattr(checkpoint, '_safe_torch_load'):  # onedl-mmengine
        checkpoint._safe_torch_load = read_checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Load a checkpoint from a path; see :func:`vrwkv.engine.read_checkpoint`."""
    return read_checkpoint(filename, map_location)


def load_from_ceph(filename: str, map_location: Any = None, backend: str = 'petrel') -> dict:
    """Load a checkpoint from an object store; see :func:`vrwkv.engine.read_checkpoint`."""
    from mmengine.fileio import get_file_backend

    store = get_file_backend(filename, backend_args={'backend': backend})
    with store.get_local_path(filename) as path:  # safetensors reads no stream
        return read_checkpoint(path, map_location, filename)


def load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
    **kwargs,
) -> dict:
    """Download a checkpoint, unless PyTorch's cache holds it, and read it safely.

    It replaces ``torch.hub.load_state_dict_from_url`` in mmengine, with the same arguments, for
    ``http(s)://``, ``torchvision://``, ``open-mmlab://`` and ``mmcls://``.
    :func:`vrwkv.engine.cache.fetch` downloads the file.

    Raises:
        CheckpointError: If the download fails or its SHA-256 is not the one in its name.
    """
    try:
        path = fetch(url, model_dir, kwargs.get('file_name'), progress)
    except DownloadError as error:
        raise CheckpointError(str(error)) from error
    return read_checkpoint(path, map_location)


@cache
def find_packages_without_pkg_resources() -> None:
    """Make mmengine find installed packages through ``importlib``.

    mmengine 0.10 reads ``_base_ = 'mmdet::...'`` with ``pkg_resources``, which new environments
    lack. It also looks for the distribution ``mmsegmentation``, which the onedl forks call
    ``onedl-mmsegmentation``. This may go when mmengine uses ``importlib`` and the import names.
    """
    from mmengine import config, hub, utils

    for module in (utils, utils.package_utils, config.config, hub.hub):
        for function in (is_installed, get_installed_path):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


@cache
def prepare_configs_once() -> None:
    """Make mmengine format each config once, and read a package's model index once.

    To start a run, mmengine 0.10 formats its config with yapf three times, which takes seconds. For
    each ``_base_ = 'mmseg::...'`` it reads all metafiles of the package. This may go when mmengine
    keeps the results.
    """
    from mmengine.config import config, utils

    # onedl-mmengine imports yapf's function where it calls it.
    owner = config if hasattr(config, 'FormatCode') else import_module('yapf.yapflib.yapf_api')
    format_code = owner.FormatCode
    formatted: dict[str, tuple[str, bool]] = {}

    def format_once(text: str, **kwargs: Any) -> tuple[str, bool]:
        if text not in formatted:
            formatted.clear()  # a process has one config at a time
            formatted[text] = format_code(text, **kwargs)
        return formatted[text]

    owner.FormatCode = format_once
    utils.load = cache(utils.load)


def is_installed(package: str) -> bool:
    """Tell whether a distribution or a module is installed.

    Args:
        package: The name of either, such as ``'mmsegmentation'`` or ``'mmseg'``.
    """
    return _is_distribution(package) or _folder(package) is not None


def get_installed_path(package: str) -> str:
    """Return the folder of an installed package.

    Args:
        package: The name of a distribution or of a module.

    Raises:
        PackageNotFoundError: If there is no such package.
    """
    folder = _folder(package)
    if folder is None and _is_distribution(package):
        modules = (distribution(package).read_text('top_level.txt') or '').split()
        folder = next(filter(None, map(_folder, modules)), None)
    if folder is None:
        raise PackageNotFoundError(package)
    return folder


def _is_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _folder(package: str) -> str | None:
    """Return the folder of a module, or of the module of one of OpenMMLab's distributions."""
    from mmengine.config.utils import MODULE2PACKAGE

    module = next((m for m, name in MODULE2PACKAGE.items() if name == package), package)
    spec = find_spec(module)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent)


@cache
def skip_byte_order_marks() -> None:
    """Make mmengine skip the byte order mark of text files: lists, annotations and configs.

    mmengine (up to 0.10.7) keeps it, so that the first class of a list gets a name that no file
    has, and JSON is an error. This may go when mmengine reads text as ``utf-8-sig``.
    """
    import mmengine.config.config as config
    import mmengine.fileio.backends.local_backend as local_backend

    local_backend.open = config.open = open_without_mark


def open_without_mark(
    file: str, mode: str = 'r', *args, encoding: str | None = None, **kwargs
) -> io.TextIOBase:
    """Open a file as :func:`open` does; text is read as UTF-8 without a byte order mark."""
    if 'b' not in mode and 'r' in mode and encoding in (None, 'utf-8'):
        encoding = 'utf-8-sig'
    return open(file, mode, *args, encoding=encoding, **kwargs)


@cache
def check_before_loading(check: Callable[[nn.Module, Mapping[str, Tensor]], None]) -> None:
    """Make mmengine's ``load_state_dict`` call a check first.

    mmengine leaves out the weights that do not fit, with a warning, and goes on with random ones.
    That is its design, so this replacement stays.

    Args:
        check: Raises an error for weights that do not fit a model. A model wrapper, such as DDP's,
            has been removed.
    """
    from mmengine.model import is_model_wrapper
    from mmengine.runner import checkpoint

    load = checkpoint.load_state_dict

    @wraps(load)
    def load_state_dict(
        module: nn.Module, state_dict: Mapping[str, Tensor], *args, **kwargs
    ) -> None:
        check(module.module if is_model_wrapper(module) else module, state_dict)
        load(module, state_dict, *args, **kwargs)

    checkpoint.load_state_dict = load_state_dict


@contextmanager
def without_cuda_set_device() -> Iterator[None]:
    """Make ``torch.cuda.set_device`` do nothing in the block.

    All launchers of mmengine 0.10 call it, also where there is no GPU. It may go when they ask
    first.
    """
    original = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = original


# --- the default scope --------------------------------------------------------------------------

_SCOPES = ('mmpretrain', 'mmdet', 'mmseg')


def _in_scope(function: Callable, scope: str) -> Callable:
    """Give a function a default scope where another of the three libraries has set its own."""

    @wraps(function)
    def wrapper(*args, **kwargs) -> Any:
        current = DefaultScope.get_current_instance()
        others = current is not None and current.scope_name in _SCOPES
        with DefaultScope.overwrite_default_scope(scope if others else None):
            return function(*args, **kwargs)

    return wrapper


@cache
def keep_scope_of_mmpretrain() -> None:
    """Make mmpretrain's inferencers build their pipelines in mmpretrain's scope.

    mmpretrain 1.2 builds the model in its own scope, but the pipeline in the process's default
    scope, which an earlier detector or segmentor has set to its own: ``PackInputs is not in the
    mmdet::transform registry``. This may go when mmpretrain sets the scope there, too.
    """
    from mmpretrain.apis.base import BaseInferencer

    BaseInferencer.__init__ = _in_scope(BaseInferencer.__init__, 'mmpretrain')


@cache
def keep_scope_of_mmdet() -> None:
    """Make mmdet's ``inference_detector`` build its pipeline in mmdet's scope.

    mmdet 3.3 builds the pipeline at each call, in the scope of the model that was made last in the
    process. This may go when it sets the scope of its model's config.
    """
    from mmdet.apis import inference

    inference.Compose = _in_scope(inference.Compose, 'mmdet')


@cache
def keep_scope_of_mmseg() -> None:
    """Make mmseg's ``inference_model`` build its pipeline in mmseg's scope.

    mmsegmentation 1.2 builds the pipeline at each call, in the scope of the model that was made
    last in the process. This may go when it sets the scope of its model's config.
    """
    from mmseg.apis import utils

    utils.Compose = _in_scope(utils.Compose, 'mmseg')


# --- images -------------------------------------------------------------------------------------


@cache
def check_images(library: str) -> None:
    """Make a library check the images that it reads, and their number of bands.

    See :class:`.images.CheckedLoadImageFromFile` and :func:`.images.check_bands`.

    Args:
        library: ``'mmpretrain'``, ``'mmdet'`` or ``'mmseg'``.
    """
    from .images import CheckedLoadImageFromFile, check_bands, imread

    kinds = dict(
        mmpretrain='ClsDataPreprocessor', mmdet='DetDataPreprocessor', mmseg='SegDataPreProcessor'
    )
    import_module(f'{library}.datasets.transforms')  # registers the loader that is replaced
    transforms = import_module(f'{library}.registry').TRANSFORMS
    transforms.register_module('LoadImageFromFile', force=True, module=CheckedLoadImageFromFile)
    check_bands(getattr(import_module(f'{library}.models'), kinds[library]), library == 'mmdet')
    if library == 'mmpretrain':
        import_module('mmpretrain.apis.image_classification').imread = imread


@cache
def normalise_any_number_of_bands() -> None:
    """Let onedl-mmsegmentation's data preprocessor take a mean for each band, as mmsegmentation's.

    onedl-mmsegmentation 1.4 takes means of one or three bands. This may go when it takes others.
    """
    from mmseg.models import SegDataPreProcessor

    init = SegDataPreProcessor.__init__

    @wraps(init)
    def any_bands(
        self, mean: Sequence | None = None, std: Sequence | None = None, *args, **kwargs
    ) -> None:
        if mean is None or std is None or len(mean) in (1, 3):
            init(self, mean, std, *args, **kwargs)
            return
        init(self, None, None, *args, **kwargs)
        self._enable_normalize = True
        for name, values in dict(mean=mean, std=std).items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), False)

    SegDataPreProcessor.__init__ = any_bands


# --- mmpretrain ---------------------------------------------------------------------------------


@cache
def suggest_model_names() -> None:
    """Make mmpretrain's hub suggest the nearest name for a model that it does not have.

    mmpretrain 1.2 says only that there is no such model. This may go when it suggests names.
    """
    from mmpretrain.apis.model import ModelHub

    from .model_index import unknown_model

    original = ModelHub.get

    def get(model_name: str) -> Any:
        ModelHub._register_mmpretrain_models()
        if model_name.lower() not in ModelHub._models_dict:
            message = unknown_model(model_name, ModelHub._models_dict)
            raise ValueError(f'{message} `mmpretrain.list_models` lists all')
        return original(model_name)

    ModelHub.get = get


# --- mmdet --------------------------------------------------------------------------------------


@cache
def skip_byte_order_marks_in_coco() -> None:
    """Make pycocotools, which mmdet reads annotations with, skip a byte order mark.

    pycocotools (up to 2.0.11) refuses such JSON. This may go when it reads ``utf-8-sig``.
    """
    import pycocotools.coco

    pycocotools.coco.open = open_without_mark


@cache
def extract_regions_from_any_map() -> None:
    """Give mmdet's extractors of regions contiguous float32 maps.

    mmcv 2.1's RoIAlign reads the memory of a map as if it were contiguous. From a channels-last
    map, which every convolution returns for a channels-last input, it takes other features, without
    an error. It also lacks bfloat16, the type of mixed precision on CPUs, to which mmdet 3.3 would
    round the regions: near 1,000 pixels, bfloat16's numbers are 4 pixels apart. This may go when
    mmcv's RoIAlign reads strides and bfloat16, and mmdet keeps regions in float32.
    """
    from mmdet.models.roi_heads.roi_extractors import GenericRoIExtractor, SingleRoIExtractor

    for extractor in (SingleRoIExtractor, GenericRoIExtractor):
        extractor.forward = _in_float32(_contiguous(extractor.forward))


@cache
def predict_in_float32() -> None:
    """Make mmdet's heads turn bfloat16 outputs into predictions in float32.

    Neither mmcv 2.1's non-maximum suppression nor numpy knows bfloat16, the type of mixed precision
    on CPUs, and mmdet 3.3 would round anchors to it. float16, as on GPUs, is left as it is. This
    may go when mmdet predicts in float32 under autocast.
    """
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.detectors import BaseDetector
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead

    for head in (BaseDenseHead, BBoxHead, FCNMaskHead):
        head.predict_by_feat = _in_float32(head.predict_by_feat)

    # Other heads, such as DETR's, make their predictions in methods of their own.
    add = BaseDetector.add_pred_to_datasample

    @wraps(add)
    def add_in_float32(self, data_samples: list, results_list: list) -> list:
        for result in results_list:
            for name, value in result.items():
                result.set_field(_widen(value, set()), name)
        return add(self, data_samples, results_list)

    BaseDetector.add_pred_to_datasample = add_in_float32


def _widen(value: Any, devices: set[str]) -> Any:
    """Make float32 of the bfloat16 in lists and tuples, and note the devices that it was on."""
    if isinstance(value, (list, tuple)):
        return type(value)(_widen(item, devices) for item in value)
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        devices.add(value.device.type)
        return value.float()
    return value


def _in_float32(method: Callable) -> Callable:
    """Give a method float32 for bfloat16, and keep autocast from undoing that."""

    @wraps(method)
    def wrapper(self, *args, **kwargs) -> Any:
        devices: set[str] = set()
        args = _widen(args, devices)
        kwargs = {name: _widen(value, devices) for name, value in kwargs.items()}
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return method(self, *args, **kwargs)

    return wrapper


def _contiguous(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def wrapper(self, feats: tuple[Tensor, ...], *args, **kwargs) -> Tensor:
        return forward(self, tuple(feat.contiguous() for feat in feats), *args, **kwargs)

    return wrapper
