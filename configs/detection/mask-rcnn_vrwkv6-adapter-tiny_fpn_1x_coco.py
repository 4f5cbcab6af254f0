_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_1x_coco.py',
    '../_base_/models/vrwkv6_adapter/tiny.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    neck=dict(in_channels=[192, 192, 192, 192]),
)

optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
