_base_ = [
    './mask-rcnn_vrwkv-adapter-small_fpn_1x_coco.py',
    '../_base_/models/vrwkv_adapter/base.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
