_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './vrwkv_adapter/tiny.py']

# Pads images to multiples of 32, as the adapter needs them.
model = dict(
    backbone=dict(_delete_=True, **_base_.pop('backbone'), fuse='last'),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
