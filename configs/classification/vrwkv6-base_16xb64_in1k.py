_base_ = [
    '../_base_/recipes/imagenet_300e_224.py',
    '../_base_/models/vrwkv6/base.py',
]

optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
