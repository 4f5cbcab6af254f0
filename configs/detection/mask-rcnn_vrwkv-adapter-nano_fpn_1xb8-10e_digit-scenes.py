_base_ = [
    '../_base_/models/mask-rcnn_adapter_fpn.py',
    '../_base_/models/vrwkv_adapter/nano.py',
    '../_base_/datasets/digit_scenes_coco.py',
    '../_base_/schedules/coco_1x_adamw_layer-decay.py',
    '../_base_/default_runtime_det.py',
]

# From scratch, on images of 128 pixels with objects of 20 to 45: a small model.
norm_cfg = dict(type='BN')  # SyncBN needs a GPU in each process where there are several
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        img_size=128,
        embed_dims=48,
        deform_num_heads=6,
        norm_cfg=norm_cfg,
    ),
    neck=dict(in_channels=[48, 48, 48, 48], out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[6], ratios=[1.0, 2.0]),
    ),
    roi_head=dict(
        # sampling_ratio: mmcv's RoIAlign runs on one core of a CPU.
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=64,
            conv_out_channels=64,
            fc_out_channels=256,
            num_classes=10,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=32, num_classes=10, norm_cfg=norm_cfg
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(max_per_img=20),
    ),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # no pre-trained weights to keep
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=75),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=10, val_interval=5)
auto_scale_lr = dict(base_batch_size=8)

default_hooks = dict(logger=dict(interval=25))
randomness = dict(seed=0)
