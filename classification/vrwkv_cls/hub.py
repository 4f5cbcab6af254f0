"""Puts the models into mmpretrain's hub: ``get_model``, ``list_models``, ``inference_model``."""

from __future__ import annotations

from mmpretrain.apis.model import ModelHub
from modelindex.models.Model import Model

from vrwkv.engine.model_index import index_folder, unknown_model

_get = ModelHub.get


def get(model_name: str) -> Model:
    """Look a model up in mmpretrain's hub.

    Args:
        model_name: Its name, in any case.

    Returns:
        What the hub knows of it, with its config.

    Raises:
        ValueError: If there is no model of that name; the message, unlike mmpretrain's, suggests
            the nearest.
    """
    ModelHub._register_mmpretrain_models()
    if model_name.lower() not in ModelHub._models_dict:
        raise ValueError(
            f'{unknown_model(model_name, ModelHub._models_dict)} `mmpretrain.list_models` lists all'
        )
    return _get(model_name)


def register_models() -> None:
    """Add the classifiers of the model index to mmpretrain's hub."""
    folder = index_folder()
    ModelHub.register_model_index(folder / 'configs/classification/metafile.yml', folder)
    ModelHub.get = get
