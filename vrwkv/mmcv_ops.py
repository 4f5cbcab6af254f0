"""The operators of mmcv that this project and common detectors need, without compiled mmcv.

mmcv-lite, and onedl-mmcv built without operators, lack the extension module ``mmcv._ext``, so
``mmcv.ops`` and with it mmdet and mmseg cannot be imported. :func:`serve_mmcv_ops` offers a module
of that name where there is none:

* non-maximum suppression and RoIAlign (average pooling) are torchvision's, with the same results;
* deformable attention on GPUs is :func:`vrwkv_ops.ms_deform_attn`;
* the sigmoid focal loss, which mmdet and mmseg use on GPUs only, is torchvision's;
* every other operator raises an error when it is called.

Compiled mmcv always takes precedence.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

EXTENSION = 'mmcv._ext'
DISTRIBUTIONS = ('mmcv', 'mmcv-lite', 'onedl-mmcv')  # all install the same folder
_UNINSTALL = f'pip uninstall -y {" ".join(DISTRIBUTIONS)}'
SERVED = (
    'nms and RoIAlign are those of torchvision, deformable attention that of vrwkv_ops, the '
    'sigmoid focal loss runs in PyTorch, and other operators raise an error'
)


def installed() -> dict[str, str]:
    """Return the version of each installed distribution of mmcv."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def how_to_compile() -> str:
    """Return the line to type for compiled mmcv."""
    onedl = 'onedl-mmcv' in installed()
    package, flavour = ('onedl-mmcv', ' OPENMMLAB=onedl') if onedl else ('mmcv==2.1.0', '')
    return (
        f'make install-mmcv{flavour} (in another environment: {_UNINSTALL}; '
        "pip install 'setuptools<81' wheel ninja psutil && "
        f'pip install --no-build-isolation --no-cache-dir {package})'
    )


def how_to_install() -> str:
    """Return the line to type for mmcv without compiled operators."""
    # A cached onedl-mmcv may be a compiled one.
    package = '--no-cache-dir onedl-mmcv' if 'onedl-mmcv' in installed() else 'mmcv-lite==2.1.0'
    return f'{_UNINSTALL}; pip install {package}'


def torchvision_error(error: Exception) -> ImportError:
    """Return the error to raise where torchvision does not work with this PyTorch."""
    minor = int(torch.__version__.split('.')[1])
    return ImportError(
        f'torchvision does not work with PyTorch {torch.__version__} ({error}). Type: pip install '
        f'--force-reinstall --no-deps torchvision==0.{minor + 15}.*',
        name='torchvision',
    )


def require_one_mmcv() -> None:
    """Check that at most one distribution of mmcv is installed.

    Raises:
        ImportError: If there are several: they share one folder.
    """
    versions = installed()
    if len(versions) > 1:
        raise ImportError(
            f'{" and ".join(f"{k} {v}" for k, v in versions.items())} are installed over each '
            f'other, in the same folder. Type: {how_to_install()} (or compile mmcv: '
            f'{how_to_compile()})'
        )


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    # As mmcv does: sort once (ties fall where they fall), compare with a threshold in float32.
    order = scores.sort(0, descending=True).indices
    boxes = boxes[order].float() + boxes.new_tensor([0, 0, offset, offset], dtype=torch.float32)
    rank = torch.arange(len(order), 0, -1, dtype=torch.float32, device=boxes.device)
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    return order[torch.ops.torchvision.nms(boxes, rank, threshold)]


def _roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    if pool_mode != 1:
        _unavailable("RoIAlign with pool_mode='max'")
    shape = (aligned_height, aligned_width)
    arguments = (input, rois, spatial_scale, *shape, sampling_ratio, aligned)
    output.copy_(torch.ops.torchvision.roi_align(*arguments))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    shape = (aligned_height, aligned_width, *grad_input.shape)
    arguments = (grad_output, rois, spatial_scale, *shape, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(*arguments))


def _ms_deform_attn_forward(
    value: Tensor,
    shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    im2col_step: int,
) -> Tensor:
    # Not above: without vrwkv_ops, explain_missing, which needs this module, says what to install.
    from vrwkv_ops import ms_deform_attn

    return ms_deform_attn(value, shapes.tolist(), locations, weights)


def _ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    grads = torch.ops.vrwkv_ops.ms_deform_attn_backward(
        grad_output, value, shapes.flatten().tolist(), locations, weights
    )
    for buffer, grad in zip((grad_value, grad_locations, grad_weights), grads, strict=True):
        buffer.copy_(grad)


def _focal_loss(target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Callable:
    from torchvision.ops import sigmoid_focal_loss

    if weight.numel():
        _unavailable('sigmoid_focal_loss with class weights')

    def loss(logits: Tensor) -> Tensor:
        classes = torch.arange(logits.shape[1], device=logits.device)
        one_hot = (target[:, None] == classes).to(logits.dtype)
        return sigmoid_focal_loss(logits, one_hot, alpha, gamma)

    return loss


def _sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_focal_loss(target, weight, gamma, alpha)(input))


def _sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    logits = input.detach().requires_grad_()
    with torch.enable_grad():
        loss = _focal_loss(target, weight, gamma, alpha)(logits).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _unavailable(name: str) -> None:
    raise NotImplementedError(
        f'{name} needs compiled mmcv, and this environment has '
        f'{" and ".join(installed()) or "mmcv"} without compiled operators ({SERVED}). '
        f'To compile mmcv: {how_to_compile()}'
    )


class _Extension(ModuleType):
    """Stand in for the compiled ``mmcv._ext``."""

    nms = staticmethod(_nms)
    roi_align_forward = staticmethod(_roi_align_forward)
    roi_align_backward = staticmethod(_roi_align_backward)
    ms_deform_attn_forward = staticmethod(_ms_deform_attn_forward)
    ms_deform_attn_backward = staticmethod(_ms_deform_attn_backward)
    sigmoid_focal_loss_forward = staticmethod(_sigmoid_focal_loss_forward)
    sigmoid_focal_loss_backward = staticmethod(_sigmoid_focal_loss_backward)
    # mmcv's and mmdet's reports of the environment ask for these.
    get_compiler_version = staticmethod(lambda: 'not compiled')
    get_compiling_cuda_version = staticmethod(lambda: 'not available')

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args: Any, **kwargs: Any) -> None:
            _unavailable(f'the operator {name} of mmcv')

        return operator


class _Finder(MetaPathFinder, Loader):
    """Find :class:`_Extension` where all other finders have found no ``mmcv._ext``."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin=__name__) if name == EXTENSION else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Extension(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        from mmengine.logging import print_log

        try:
            import torchvision  # noqa: F401 (registers the operators)
        except (ImportError, RuntimeError) as error:
            raise torchvision_error(error) from error
        print_log(f'mmcv has no compiled operators: {SERVED}.', 'current', logging.INFO)


def serve_mmcv_ops() -> None:
    """Make ``mmcv.ops`` importable where mmcv has no compiled operators.

    Call it before importing ``mmcv.ops``, mmdet's or mmseg's models; calling it again changes
    nothing.

    Raises:
        ImportError: If several distributions of mmcv are installed: they share one folder.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    require_one_mmcv()
    sys.meta_path.append(_Finder())
    # mmcv.cnn, which mmpretrain imports, leaves this class out where mmcv.ops cannot be imported.
    transformer = sys.modules.get('mmcv.cnn.bricks.transformer')
    if transformer and not hasattr(transformer, 'MultiScaleDeformableAttention'):
        from mmcv.ops import MultiScaleDeformableAttention

        transformer.MultiScaleDeformableAttention = MultiScaleDeformableAttention
    # onedl's mmdet and mmseg replace the operators by stubs there.
    importers = [
        module
        for name, module in sys.modules.items()
        if name.startswith(('mmdet.models.', 'mmseg.models.'))
    ]
    if importers:
        from mmcv import ops

        for module in importers:
            for name in vars(module).keys() & set(ops.__all__):
                setattr(module, name, getattr(ops, name))


def describe() -> str:
    """Say in a sentence what serves mmcv's operators, and how to change that."""
    try:
        serve_mmcv_ops()
        spec = find_spec(EXTENSION)
    except ImportError as error:
        return f"mmcv's operators: none ({error})"
    if isinstance(spec.loader, _Finder):
        return f"mmcv's operators: {SERVED}. To compile all of mmcv's: {how_to_compile()}"
    return f"mmcv's operators: compiled, {spec.origin}"
