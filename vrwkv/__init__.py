"""Vision-RWKV models: the backbones and their layers, each defined once."""
