"""Add the models to mmpretrain's hub: ``get_model``, ``list_models``, ``inference_model``."""

from mmpretrain.apis.model import ModelHub

from vrwkv.engine.model_index import index_folder


def register_models() -> None:
    """Add the classifiers of the model index to mmpretrain's hub."""
    folder = index_folder()
    ModelHub.register_model_index(folder / 'configs/classification/metafile.yml', folder)
