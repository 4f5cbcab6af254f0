_base_ = [
    '../_base_/models/upernet_adapter.py',
    '../_base_/models/vrwkv_adapter/nano.py',
    '../_base_/datasets/camvid_360x480.py',
    '../_base_/schedules/schedule_160k_adamw_layer-decay.py',
    '../_base_/default_runtime_seg.py',
]

# From scratch, on photographs of 480 x 360 pixels: a small model.
norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN needs a GPU in each of several processes
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _base_.pop('backbone'),
        img_size=_base_.crop_size,
        embed_dims=64,
        deform_num_heads=4,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=11, norm_cfg=norm_cfg),
    test_cfg=dict(mode='whole'),
)

optim_wrapper = dict(
    optimizer=dict(lr=2e-3, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # no pre-trained weights to keep
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    # Without `end`, it lasts as long as the training: change max_iters alone.
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=50, by_epoch=False),
]
train_cfg = dict(max_iters=2000, val_interval=1000)
auto_scale_lr = dict(base_batch_size=4)

default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(interval=1000, max_keep_ckpts=1, save_best=None)
)
randomness = dict(seed=0)
