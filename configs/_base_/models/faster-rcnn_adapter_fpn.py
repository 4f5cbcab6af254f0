_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py']

# The adapter in place of ResNet-50. A config adds its arguments, and its width to the neck.
model = dict(backbone=dict(_delete_=True, fuse='last'))
