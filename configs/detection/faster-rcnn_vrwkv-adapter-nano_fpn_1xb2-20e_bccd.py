_base_ = [
    '../_base_/models/faster-rcnn_adapter_fpn.py',
    '../_base_/models/vrwkv_adapter/nano.py',
    '../_base_/datasets/bccd_coco.py',
    '../_base_/schedules/coco_1x_adamw_layer-decay.py',
    '../_base_/default_runtime_det.py',
]

# Boxes without masks, from scratch: a small model.
norm_cfg = dict(type='BN')  # SyncBN needs a GPU in each process where there are several
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        img_size=(240, 320),
        embed_dims=64,
        deform_num_heads=4,
        norm_cfg=norm_cfg,
    ),
    neck=dict(in_channels=[64, 64, 64, 64], out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4, 6], ratios=[1.0]),  # cells are round
    ),
    roi_head=dict(
        # sampling_ratio: RoIAlign runs on one core of a CPU.
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(max_per_img=50),
    ),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # no pre-trained weights to keep
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=20, val_interval=5)
auto_scale_lr = dict(base_batch_size=2)

default_hooks = dict(logger=dict(interval=50))  # twice per epoch
randomness = dict(seed=0)
