_base_ = [
    '../_base_/recipes/imagenet_300e_224.py',
    '../_base_/models/vrwkv6/tiny.py',
]

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
