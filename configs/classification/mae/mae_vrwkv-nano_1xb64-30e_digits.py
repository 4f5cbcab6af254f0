_base_ = [
    '../../_base_/models/vrwkv/mae.py',
    '../../_base_/datasets/digits_bs64.py',
    '../../_base_/schedules/imagenet_bs4096_adamw_mae.py',
    '../../_base_/default_runtime_cls.py',
]

# A patch is one pixel of scikit-learn's digits, which are enlarged four times.
model = dict(
    backbone=dict(
        img_size=32,
        patch_size=4,
        embed_dims=64,
        depth=4,
        drop_path_rate=0.0,
        init_values=None,
        post_norm=False,
        key_norm=False,
    ),
    neck=dict(
        num_patches=64,
        patch_size=4,
        embed_dims=64,
        decoder_embed_dims=48,
        decoder_depth=2,
        drop_path_rate=0.0,
        init_values=None,
        post_norm=False,
        key_norm=False,
    ),
    head=dict(patch_size=4),
)
data_preprocessor = dict(
    _delete_=True,
    type='SelfSupDataPreprocessor',
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5],
    to_rgb=True,
)

# All of the training digits, without their labels.
train_dataloader = dict(dataset=dict(with_label=False))
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = test_evaluator = test_cfg = None

optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=3, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(
    logger=dict(interval=23),  # once per epoch
    checkpoint=dict(interval=10),
)
randomness = dict(seed=0)
