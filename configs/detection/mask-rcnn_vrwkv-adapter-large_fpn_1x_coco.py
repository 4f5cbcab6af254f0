_base_ = [
    './mask-rcnn_vrwkv-adapter-base_fpn_1x_coco.py',
    '../_base_/models/vrwkv_adapter/large.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
