# DeiT with the width, the depth and the recipe of the VRWKV, and 0.3 % more parameters.
_base_ = ['../vrwkv-nano_1xb64-15e_cifar10.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        # As many parameters in a layer: a VRWKV layer has 13 products of 64 x 64, not 12.
        arch=dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=288),
        img_size=32,
        patch_size=4,
    ),
    neck=None,
    head=dict(type='VisionTransformerClsHead'),
)
