# demo/ablation_digits.py trains five variants of this: digits at random places.
_base_ = ['../vrwkv-nano_1xb64_digits.py']

model = dict(
    backbone=dict(img_size=48, patch_size=6, embed_dims=64, depth=4),
    head=dict(in_channels=64),
)

data_root = 'data/scattered_digits'
digits = None  # not those of demo/digits_demo.py
# No augmentation: places and sizes vary already.
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=_base_.test_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=8, val_interval=8)
default_hooks = dict(checkpoint=dict(interval=8))
