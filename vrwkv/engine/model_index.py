"""The model index: names, configs and released weights of the models of every task."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class ModelInfo(NamedTuple):
    """Entry of the model index."""

    name: str
    config: Path
    weights: str | None


def index_folder() -> Path:
    """Return the folder of ``model-index.yml`` and the configs.

    Returns:
        The root of the checkout, or ``vrwkv/.mim`` where the package was installed as a wheel.

    Raises:
        FileNotFoundError: If neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / '.mim', package.parent):
        if (folder / 'model-index.yml').is_file():
            return folder
    raise FileNotFoundError(
        f'there is no model-index.yml in {package.parent} or {package / ".mim"}: reinstall '
        'vision-rwkv as described in docs/install.md'
    )


def list_models() -> dict[str, ModelInfo]:
    """Read the model index.

    Returns:
        The models of every task by name.
    """
    from mmengine.fileio import load  # unknown_model serves without mmengine, too

    folder = index_folder()
    models = {}
    for metafile in load(folder / 'model-index.yml')['Import']:
        for model in load(folder / metafile)['Models']:
            info = ModelInfo(model['Name'], folder / model['Config'], model.get('Weights'))
            models[info.name] = info
    return models


def find_model(name: str) -> ModelInfo:
    """Look a model up.

    Args:
        name: Its name, in any case.

    Returns:
        The model.

    Raises:
        ValueError: If there is no model of that name. The message suggests similar names.
    """
    models = list_models()
    if name.lower() not in models:
        raise ValueError(unknown_model(name, models))
    return models[name.lower()]


def unknown_model(name: str, names: Iterable[str]) -> str:
    """Return the error message for an unknown model.

    Args:
        name: The requested name.
        names: The names of the known models.

    Returns:
        A message that suggests similar names, if there are any.
    """
    names = sorted(names)
    # Users leave out the end of a name, its recipe.
    near = [known for known in names if known.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)
    hint = f' Did you mean {" or ".join(near[:5])}?' if near else ''
    return f'there is no model {name!r}.{hint}'
