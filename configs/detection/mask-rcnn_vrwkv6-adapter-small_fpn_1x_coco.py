_base_ = [
    './mask-rcnn_vrwkv-adapter-small_fpn_1x_coco.py',
    '../_base_/models/vrwkv6_adapter/small.py',
]

model = dict(backbone=_base_.pop('backbone'))
