"""Run the files of :mod:`vrwkv.export` without the model's Python code."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ._imports import explain_missing

Runner = Callable[[np.ndarray], list[np.ndarray]]


def on_arrays(function: Callable) -> Runner:
    """Return a function of PyTorch tensors as one of NumPy arrays, without gradients.

    Args:
        function: Takes a batch of images and returns a sequence of outputs.
    """
    import torch

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [y.numpy() for y in function(torch.from_numpy(images))]

    return run


def load_exported(path: str | os.PathLike) -> tuple[Runner, dict[str, Any]]:
    """Load an exported model, on the CPU.

    Args:
        path: A file of :mod:`vrwkv.export`: ``.onnx``, ``.xml`` or ``.pt2``.

    Returns:
        A function from a batch of images, float32 of shape ``(B, channels, H, W)``, to the list of
        outputs, and the metadata (see :class:`vrwkv.export.Export`).

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the runtime is not installed.
        ValueError: If the file is of another kind, or was written for another torch.
    """
    path = Path(path)
    loaders = {'.onnx': _load_onnx, '.xml': _load_openvino, '.pt2': _load_pt2}
    if path.suffix not in loaders:
        raise ValueError(f'expected a file ending in {", ".join(loaders)}, got {path}')
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    packages = ('onnxruntime', 'openvino')
    with explain_missing(f'{path.name}', extra='deployment', brings=packages):
        run, facts = loaders[path.suffix](path)
    if facts is None:
        raise ValueError(f'{path} was not written by vrwkv.export')
    return run, facts


def _load_onnx(path: Path) -> tuple[Runner, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that wait in a loop would slow everything else in the process down.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    session = onnxruntime.InferenceSession(os.fspath(path), options, ['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    facts = session.get_modelmeta().custom_metadata_map.get('vrwkv', 'null')
    return lambda images: session.run(None, {name: images}), json.loads(facts)


def _load_openvino(path: Path) -> tuple[Runner, dict[str, Any]]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    facts = model.get_rt_info('vrwkv').astype(str) if model.has_rt_info('vrwkv') else 'null'
    # Some processors would compute in bfloat16.
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: [y.copy() for y in compiled(images).values()], json.loads(facts)


def _load_pt2(path: Path) -> tuple[Runner, dict[str, Any]]:
    import torch

    facts, version = _read_pt2(path)
    if facts.get('form') == 'operators':
        import vrwkv_ops  # noqa: F401 (its library has the operators)
    if version is None:
        module = torch.export.load(path).module()
    elif version != torch.__version__:
        raise ValueError(
            f'{path} was compiled by torch {version}, and this is torch {torch.__version__}: '
            'export it again here'
        )
    else:
        module = torch._inductor.aoti_load_package(os.fspath(path))
    return on_arrays(module), facts


def _read_pt2(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the metadata and, if the program is compiled, the version of torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith('_metadata.json'):
                    compiled = json.loads(archive.read(name))
                    if 'vrwkv' in compiled:
                        return json.loads(compiled['vrwkv']), compiled['torch']
                if name.endswith('extra/vrwkv'):
                    return json.loads(archive.read(name)), None
    except (zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is damaged, or no .pt2 file: {error}') from error
    raise ValueError(f'{path} was not written by vrwkv.export')
