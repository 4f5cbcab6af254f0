"""Vision-RWKV models: the backbones and their layers, each defined once."""

__version__ = '0.1.0'
