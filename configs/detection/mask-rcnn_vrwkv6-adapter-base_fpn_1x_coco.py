_base_ = [
    './mask-rcnn_vrwkv-adapter-base_fpn_1x_coco.py',
    '../_base_/models/vrwkv6_adapter/base.py',
]

model = dict(backbone=_base_.pop('backbone'))
