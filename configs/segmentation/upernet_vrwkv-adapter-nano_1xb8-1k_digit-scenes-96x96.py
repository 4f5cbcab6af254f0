_base_ = [
    '../_base_/models/upernet_adapter.py',
    '../_base_/models/vrwkv_adapter/nano.py',
    '../_base_/datasets/digit_scenes_ade20k.py',
    '../_base_/schedules/schedule_160k_adamw_layer-decay.py',
    '../_base_/default_runtime_seg.py',
]

# From scratch, on images of 96 pixels with digits of 24 to 48: a small model.
norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN needs a GPU in each of several processes
class_weight = [0.2] + [1.0] * 10  # most pixels are background, and soon easy
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        _base_.pop('backbone'),
        img_size=96,
        embed_dims=48,
        deform_num_heads=6,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=[48, 48, 48, 48],
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    auxiliary_head=dict(
        in_channels=48,
        channels=32,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight),
    ),
    test_cfg=dict(mode='whole', crop_size=(96, 96), stride=(64, 64)),
)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(lr=2e-3, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # no pre-trained weights to keep
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=50, by_epoch=False),
]
train_cfg = dict(max_iters=1000, val_interval=500)
auto_scale_lr = dict(base_batch_size=8)

default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(interval=500, max_keep_ckpts=1, save_best=None)
)
randomness = dict(seed=0)
