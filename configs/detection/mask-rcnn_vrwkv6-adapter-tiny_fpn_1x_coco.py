_base_ = [
    './mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco.py',
    '../_base_/models/vrwkv6_adapter/tiny.py',
]

model = dict(backbone=_base_.pop('backbone'))
