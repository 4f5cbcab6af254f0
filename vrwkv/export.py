"""Export models to ONNX, OpenVINO, AOTInductor and torch.export, checked against PyTorch.

The four exporters take a config or a model, export it in evaluation mode, and compare the result
with PyTorch before they write a file: on several sizes if the file takes any. docs/deployment.md
compares the routes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vrwkv_ops.decomposition import CHUNK, FORMS, decompositions

from ._imports import explain_missing
from .exported import Runner, load_exported, on_arrays
from .weights import input_channels

OPSETS = (18, 20)  # the oldest that PyTorch writes; the oldest with all operators of the adapters
# Largest total decay, abs(w) * T, of the forms with one frame for the whole image.
ONE_FRAME_LIMIT = 40
# Largest decay over one chunk of the chunked form: its weights are exp(+-half of it) in float32.
CHUNK_LIMIT = 80
CHUNKS = (32, CHUNK, 8, 4)
# Accepted difference from PyTorch, relative to the largest output.
TOLERANCE = 1e-4


class Deployable(nn.Module):
    """A model with tensors for inputs and outputs, in evaluation mode.

    Args:
        model: A classifier, segmentor or detector of OpenMMLab, or a backbone.
        normalize: Whether the model subtracts the mean from its images and divides them by the
            standard deviation. The images then are RGB with values from 0 to 255.

    Raises:
        ValueError: If ``normalize`` is set and the model has no mean and standard deviation.

    Attributes:
        task: ``'classification'``, with an output ``scores`` (logits) of shape (B, classes);
            ``'segmentation'``, with ``scores`` of shape (B, classes, H, W); or ``'features'``,
            with ``features_0``, ... from backbone and neck.
    """

    def __init__(self, model: nn.Module, normalize: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        if hasattr(model, 'decode_head'):
            self.task = 'segmentation'
        elif getattr(model, 'head', None) is not None and hasattr(model, 'backbone'):
            self.task = 'classification'
        else:
            self.task = 'features'
        preprocessor = getattr(model, 'data_preprocessor', None)
        mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
        if normalize and (mean is None or std is None):
            raise ValueError(
                'normalize=True takes mean and std of the data_preprocessor, and this model has '
                'none: normalise the images yourself'
            )
        self.mean = None if mean is None else mean.flatten().tolist()
        self.std = None if std is None else std.flatten().tolist()
        self.normalize = normalize
        self.register_buffer('_mean', mean if normalize else None, persistent=False)
        self.register_buffer('_std', std if normalize else None, persistent=False)

    @property
    def backbone(self) -> nn.Module:
        """The backbone, which may be the model itself."""
        return getattr(self.model, 'backbone', self.model)

    @property
    def step(self) -> int:
        """Height and width of images must be multiples of it."""
        return 32 if hasattr(self.backbone, 'interactions') else 1

    @property
    def patch(self) -> int:
        """Side of a patch of the backbone in pixels; 1 for a backbone without patches."""
        return getattr(getattr(self.backbone, 'patch_embed', None), 'patch_size', 1)

    @property
    def metadata(self) -> dict[str, Any]:
        """Facts for the program that runs the export, see :class:`Export`, without ``shape``."""
        meta = getattr(self.model, 'dataset_meta', None) or {}
        head = getattr(self.model, 'decode_head', None)
        is_binary = getattr(head, 'out_channels', 0) == 1  # one output of mmseg for two classes
        return dict(
            task=self.task,
            classes=list(meta.get('classes') or ()),
            palette=[list(colour) for colour in meta.get('palette') or ()],
            mean=self.mean,
            std=self.std,
            normalize=self.normalize,
            step=self.step,
            threshold=head.threshold if is_binary else None,
        )

    def image_shape(
        self, size: int | Sequence[int] | None = None, batch: int = 1
    ) -> tuple[int, int, int, int]:
        """Return the shape of a batch; ``size`` as for :func:`export_program`.

        Raises:
            ValueError: If the model does not take images of the size.
        """
        if size is None:
            size = getattr(self.backbone, 'img_size', 224)
            if self.task == 'segmentation':
                size = 512
            elif self.task == 'features' and hasattr(self.model, 'extract_feat'):  # a detector
                size = (800, 1344)
        height, width = (size, size) if isinstance(size, int) else size
        least = 2 * self.patch
        if min(height, width) < least:
            raise ValueError(
                f'the image must be at least two patches high and wide, {least} pixels, got '
                f'{height} x {width}'
            )
        if height % self.step or width % self.step:
            raise ValueError(
                f'height and width must be multiples of {self.step}, got {(height, width)}'
            )
        return (batch, input_channels(self.model), height, width)

    def unnormalize(self, images: Tensor) -> Tensor:
        """Turn images as the data_preprocessor returns them into images that this model takes."""
        return images * self._std + self._mean if self.normalize else images

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run the model.

        Args:
            images: Images of shape ``(B, channels, H, W)``.

        Returns:
            The outputs of the task.
        """
        if self.normalize:
            images = (images - self._mean) / self._std
        if self.task == 'classification':
            # A VisionRWKV takes images alone.
            mode = dict(mode='tensor') if hasattr(self.model, 'data_preprocessor') else {}
            return (self.model(images, **mode),)
        if self.task == 'segmentation':
            scores = self.model(images, mode='tensor')
            align = self.model.align_corners
            size = images.shape[2:]
            return (F.interpolate(scores, size, mode='bilinear', align_corners=align),)
        if hasattr(self.model, 'extract_feat'):
            features = self.model.extract_feat(images)
        else:
            features = self.model(images)
        return tuple(features) if isinstance(features, (tuple, list)) else (features,)


@dataclass
class Export:
    """An exported model.

    Attributes:
        model: The model in PyTorch.
        program: The graph.
        form: The form of Bi-WKV in it, see :func:`vrwkv_ops.decompositions`; ``'operators'`` if the
            graph has the operators of vrwkv_ops.
        metadata: Facts for the program that runs it: ``task``, ``classes``, ``palette``,
            ``mean``, ``std``, ``normalize``, ``step`` (H and W are multiples of it),
            ``threshold`` (of the probability of class 1, where one output stands for two classes;
            else None), ``shape`` (None for any), ``form``.
        path: The file; None for :func:`export_program` without one.
        errors: For each shape that was compared, the largest difference from PyTorch, relative to
            the largest output.
    """

    model: Deployable
    program: ExportedProgram
    form: str
    metadata: dict[str, Any]
    path: Path | None = None
    errors: dict[tuple[int, ...], float] = field(default_factory=dict)

    def check(self, path: Path) -> None:
        """Compare a file with the model on all shapes of ``errors``."""
        run = load_exported(path)[0]
        self.errors = _compare(self.model, run, list(self.errors))


# --- Routes ------------------------------------------------------------------------------------


def export_program(
    model: Any,
    weights: str | os.PathLike | None = None,
    *,
    out: str | os.PathLike | None = None,
    size: int | Sequence[int] | None = None,
    batch: int = 1,
    dynamic: bool = False,
    form: str = 'auto',
    normalize: bool = False,
) -> Export:
    """Export to a program of PyTorch's standard operators, and check it.

    Args:
        model: A config, its path, or a model: of OpenMMLab, a backbone, or a
            :class:`~vrwkv.classifier.VisionRWKV`.
        weights: A checkpoint for a config's model. Without one its weights are random.
        out: A file to write, ``.pt2``, for :func:`torch.export.load`.
        size: Height and width in pixels, or one number for both. By default 512 for a segmentor,
            (800, 1344) for a detector, and otherwise the ``img_size`` of the backbone.
        batch: Number of images.
        dynamic: Whether the result takes any number of images, and images of any size.
        form: How Bi-WKV is computed, see :func:`vrwkv_ops.decompositions`. ``'auto'`` reads the
            decays, which are weights, and takes ``'cumsum'`` where it holds, else ``'chunked'``;
            ``'operators'`` leaves the operators of vrwkv_ops, which then must be loaded.
        normalize: Whether the model normalises its images, see :class:`Deployable`.

    Returns:
        The export.

    Raises:
        FileNotFoundError: If a config or checkpoint does not exist.
        RuntimeError: If the result differs from PyTorch's.
        TypeError: If the weights are half precision.
        ValueError: If an argument does not fit, or a layer's decay is out of the form's range.
    """
    _require_suffix(out, '.pt2')
    deployable = prepare(model, weights, normalize)
    shape, step = deployable.image_shape(size, batch), deployable.step
    metadata = deployable.metadata | dict(shape=None if dynamic else list(shape))
    if dynamic:  # a level of a feature pyramid with one row would have one for images of all sizes
        shape = (*shape[:2], *(max(side, 4 * step) for side in shape[2:]))
    form, chunk = _choose_form(deployable, form, shape, dynamic)
    metadata['form'] = form
    program = _trace(deployable, shape, dynamic)
    if form != 'operators':
        table = decompositions(form, chunk) | _COMPOSITES
        with _quiet():
            program = program.run_decompositions(table)
        _require_standard(program)
    export = Export(deployable, program, form, metadata)
    shapes = [shape]
    if dynamic:
        height, width = shape[2:]
        few = 2 * max(step, deployable.patch)
        shapes += [(1, shape[1], height, width + few), (3, shape[1], height + few, width)]
    export.errors = _compare(deployable, on_arrays(program.module()), shapes)
    if out is not None:
        facts = dict(vrwkv=json.dumps(metadata))
        save = partial(torch.export.save, program, extra_files=facts)
        export.path = _write(out, save)
    return export


def to_onnx(
    model: Any,
    out: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    *,
    opset: int = OPSETS[1],
    **kwargs: Any,
) -> Export:
    """Export to ONNX with standard operators only, and check it in ONNX Runtime.

    Args:
        model: See :func:`export_program`.
        out: The file to write, ``.onnx``.
        weights: See :func:`export_program`.
        opset: Version of the ONNX operators, at least 18.
        **kwargs: ``size``, ``batch``, ``dynamic``, ``form`` and ``normalize`` of
            :func:`export_program`.

    Returns:
        The export.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the opset is too low; see also :func:`export_program`.
    """
    if opset < OPSETS[0]:
        raise ValueError(
            f'opset must be at least {OPSETS[0]}, the oldest that PyTorch writes, got {opset}'
        )
    with _explain('to_onnx'):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    _refuse_operators(kwargs, 'ONNX')
    _require_suffix(out, '.onnx')
    export = export_program(model, weights, **kwargs)
    save = partial(_save_onnx, export, opset=opset)
    export.path = _write(out, save, export.check)
    return export


def to_openvino(
    model: Any, out: str | os.PathLike, weights: str | os.PathLike | None = None, **kwargs: Any
) -> Export:
    """Export to OpenVINO's two files, through ONNX, and check them in OpenVINO.

    Args:
        model: See :func:`export_program`.
        out: The file to write, ``.xml``; the weights lie beside it, in ``.bin``.
        weights: See :func:`export_program`.
        **kwargs: See :func:`to_onnx`.

    Returns:
        The export.

    Raises:
        ImportError: If a package is missing.
    """
    with _explain('to_openvino'):
        import onnxscript  # noqa: F401
        import openvino
    _refuse_operators(kwargs, 'OpenVINO')
    _require_suffix(out, '.xml')
    export = export_program(model, weights, **kwargs)

    def save(path: Path) -> None:
        onnx_file = path.with_suffix('.onnx')
        _save_onnx(export, onnx_file, OPSETS[1])
        converted = openvino.convert_model(onnx_file)
        converted.set_rt_info(json.dumps(export.metadata), 'vrwkv')
        openvino.save_model(converted, path, compress_to_fp16=False)
        onnx_file.unlink()

    export.path = _write(out, save, export.check)
    return export


def to_aoti(
    model: Any, out: str | os.PathLike, weights: str | os.PathLike | None = None, **kwargs: Any
) -> Export:
    """Compile ahead of time with AOTInductor, and check the package.

    Unless ``form`` says otherwise, the package calls the operators of vrwkv_ops. It then needs
    torch and the compiled library of vrwkv_ops, and no Python code of this project.

    Args:
        model: See :func:`export_program`.
        out: The file to write, ``.pt2``. It runs with the version of torch that wrote it.
        weights: See :func:`export_program`.
        **kwargs: See :func:`export_program`; ``form`` is ``'operators'`` by default.

    Returns:
        The export.
    """
    kwargs.setdefault('form', 'operators')
    _require_suffix(out, '.pt2')
    export = export_program(model, weights, **kwargs)
    facts = dict(vrwkv=json.dumps(export.metadata), torch=torch.__version__)

    def save(path: Path) -> None:
        with _quiet():
            torch._inductor.aoti_compile_and_package(
                export.program,
                package_path=str(path),
                inductor_configs={'aot_inductor.metadata': facts},
            )

    export.path = _write(out, save, export.check)
    return export


def quantize_onnx(
    path: str | os.PathLike, out: str | os.PathLike, images: Iterable[Tensor]
) -> Path:
    """Quantise linear layers and convolutions of an ONNX file to 8-bit integers.

    Weights are quantised per channel; the ranges of activations come from calibration images.

    Args:
        path: The file of :func:`to_onnx`.
        out: The file to write, ``.onnx``.
        images: Batches for calibration, as the model takes them.

    Returns:
        ``out``.

    Raises:
        ImportError: If onnx or onnxruntime is missing.
    """
    with _explain('quantize_onnx'):
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

    _require_suffix(out, '.onnx')
    batches = iter(images)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {'images': batch.numpy()}

    def save(draft: Path) -> None:
        prepared = draft.with_name('prepared.onnx')
        quant_pre_process(os.fspath(path), os.fspath(prepared), skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        constants = {tensor.name for tensor in graph.initializer}
        layers = [
            node.name
            for node in graph.node
            if node.op_type in ('MatMul', 'Gemm', 'Conv') and node.input[1] in constants
        ]
        quantization.quantize_static(
            os.fspath(prepared),
            os.fspath(draft),
            Reader(),
            nodes_to_quantize=layers,
            per_channel=True,
        )
        prepared.unlink()

    return _write(out, save)


# --- Model, sizes and form ---------------------------------------------------------------------


def prepare(
    model: Any, weights: str | os.PathLike | None = None, normalize: bool = False
) -> Deployable:
    """Build the model that the exporters trace; arguments as for :func:`export_program`.

    Raises:
        TypeError: If the weights are half precision.
        ValueError: If weights are given for a model that is built already.
    """
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError('weights belong to a config; load them into the model yourself')
    else:
        from .analysis.models import load_model, read_config

        cfg = read_config(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model
        model = load_model(cfg, None if weights is None else os.fspath(weights))
    halves = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        raise TypeError(
            f'the weights are {halves.pop()}; exports are float32: call model.float() first. '
            'Runtimes convert to half precision themselves'
        )
    return Deployable(model, normalize)


def _choose_form(
    deployable: Deployable, form: str, shape: tuple[int, ...], dynamic: bool
) -> tuple[str, int]:
    """Return the form of Bi-WKV for the decays of the layers, and the tokens in a chunk."""
    if form not in (*FORMS, 'operators'):
        raise ValueError(f'form must be one of {", ".join(FORMS)} or operators, got {form!r}')
    decays = {  # the largest total decay over an image, for each layer with Bi-WKV
        name: module.spatial_decay.detach().abs().max().item()
        for name, module in deployable.model.named_modules()
        if hasattr(module, 'spatial_decay')
    }
    if form == 'operators' or not decays:
        return form, CHUNK
    causal = any(getattr(module, 'causal', False) for module in deployable.model.modules())
    if causal and form in ('cumsum', 'blocked'):
        raise ValueError(
            f"form='{form}' computes attention in both directions, and this model has "
            "causal=True: use form='chunked'"
        )
    broken = [layer for layer, decay in decays.items() if not math.isfinite(decay)]
    if broken:
        raise ValueError(f'{broken[0]}.spatial_decay is not finite')
    layer = max(decays, key=decays.get)
    largest = decays[layer]
    fits = largest <= ONE_FRAME_LIMIT and not causal
    if form in ('cumsum', 'blocked') and not fits:
        raise ValueError(
            f"form='{form}' holds for a total decay over the image of up to {ONE_FRAME_LIMIT}, and "
            f"{layer}.spatial_decay reaches {largest:.0f}: use form='chunked'"
        )
    if fits and form != 'chunked':
        return 'cumsum' if form == 'auto' else form, CHUNK
    patch = deployable.patch
    tokens = 4 if dynamic else (shape[2] // patch) * (shape[3] // patch)
    chunk = next((n for n in CHUNKS if largest * n <= CHUNK_LIMIT * tokens), None)
    if chunk is None:
        raise ValueError(
            f'{layer}.spatial_decay reaches {largest:.0f}, and the chunked form holds up to '
            f'{CHUNK_LIMIT * tokens // CHUNKS[-1]} for {tokens} tokens: export '
            f'{"for one size" if dynamic else "larger images"}, or '
            "use form='operators' with to_aoti (tools/deployment/export_aoti.py)"
        )
    if form == 'auto' and not causal:
        warnings.warn(
            f'{layer}.spatial_decay reaches {largest:.0f}, above the {ONE_FRAME_LIMIT} that a '
            f'cumulative sum over the image holds: taking the chunked form, with {chunk} tokens in '
            'a chunk, which takes 2 to 7 times as long',
            stacklevel=3,
        )
    return 'chunked', chunk


# --- Graphs ------------------------------------------------------------------------------------


def _trace(deployable: Deployable, shape: tuple[int, ...], dynamic: bool) -> ExportedProgram:
    dims, step = None, deployable.step
    if dynamic:
        least = max(1, 2 * deployable.patch // step)
        sides = [Dim(f'{name}_{step}' if step > 1 else name, min=least) for name in ('h', 'w')]
        dims = dict(images={0: Dim('batch', min=1), 2: step * sides[0], 3: step * sides[1]})
        shape = (2, *shape[1:])  # a dimension of 1 would stay 1
    with torch.no_grad(), _quiet():
        return torch.export.export(deployable, (torch.zeros(shape),), dynamic_shapes=dims)


def _adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """Average bins by products with matrices, which exist for symbolic sizes too."""
    for axis, bins in zip((-2, -1), output_size, strict=True):
        size = x.shape[axis]
        bin_ = torch.arange(bins, device=x.device)[:, None]
        start, end = bin_ * size // bins, ((bin_ + 1) * size + bins - 1) // bins
        index = torch.arange(size, device=x.device)
        inside = ((index >= start) & (index < end)).to(x.dtype)
        matrix = inside / (end - start)
        x = matrix @ x if axis == -2 else x @ matrix.T
    return x


_COMPOSITES = {torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d}


def _require_standard(program: ExportedProgram) -> None:
    ours = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == 'call_function' and 'vrwkv_ops' in str(node.target)
    }
    if ours:
        raise RuntimeError(
            f'{", ".join(sorted(ours))} stays in the graph: vrwkv_ops.decompositions() does not '
            'know it'
        )


def _save_onnx(export: Export, path: Path, opset: int) -> None:
    names = ['scores']
    if export.metadata['task'] == 'features':
        outputs = export.program.graph_signature.user_outputs
        names = [f'features_{index}' for index in range(len(outputs))]
    with _quiet():
        program = torch.onnx.export(
            export.program,
            dynamo=True,
            opset_version=opset,
            input_names=['images'],
            output_names=names,
            verbose=False,
        )
    model = program.model_proto
    foreign = {node.domain for node in model.graph.node} - {''}
    if foreign:
        raise RuntimeError(f'operators of {", ".join(foreign)} stay in the ONNX graph')
    entry = model.metadata_props.add()
    entry.key, entry.value = 'vrwkv', json.dumps(export.metadata)
    path.write_bytes(model.SerializeToString())


# --- Checks and files --------------------------------------------------------------------------


def _compare(
    deployable: Deployable,
    exported: Runner,
    shapes: Sequence[tuple[int, ...]],
) -> dict[tuple[int, ...], float]:
    """Return the largest relative difference from PyTorch for each shape."""
    generator = torch.Generator().manual_seed(0)
    in_pytorch, errors = on_arrays(deployable), {}
    for shape in shapes:
        images = torch.randn(shape, generator=generator)
        if deployable.normalize:
            images = (images * 64 + 128).clamp(0, 255)
        pairs = zip(exported(images.numpy()), in_pytorch(images.numpy()), strict=True)
        errors[shape] = max(float(abs(a - b).max() / max(abs(b).max(), 1e-30)) for a, b in pairs)
        if not errors[shape] <= TOLERANCE:
            raise RuntimeError(
                f'the exported model differs from PyTorch by {errors[shape]:.1e} of the largest '
                f'output on a batch of {shape}, more than {TOLERANCE:.0e}; nothing was written'
            )
    return errors


def _require_suffix(out: str | os.PathLike | None, suffix: str) -> None:
    if out is not None and Path(out).suffix != suffix:
        raise ValueError(f'the file must end in {suffix}, got {out}')


def _write(
    out: str | os.PathLike,
    save: Callable[[Path], None],
    check: Callable[[Path], object] = lambda draft: None,
) -> Path:
    """Write beside ``out``, check, and move all files into place."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.export-') as folder:
        draft = Path(folder, out.name)
        save(draft)
        check(draft)
        # The file itself comes last: without it there is no export.
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name):
            shutil.move(path, out.with_name(path.name))
    return out


def _refuse_operators(kwargs: dict, route: str) -> None:
    if kwargs.get('form') == 'operators':
        raise ValueError(f"{route} does not have the operators of vrwkv_ops: use form='auto'")


def _explain(function: str) -> Any:
    packages = ('onnx', 'onnxscript', 'onnxruntime', 'openvino')
    return explain_missing(function, extra='deployment', brings=packages)


@contextmanager
def _quiet():
    """Suppress deprecation warnings of torch's own exporters."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=FutureWarning)
        warnings.filterwarnings('ignore', category=DeprecationWarning)
        warnings.filterwarnings('ignore', category=UserWarning, module='torch')
        yield
