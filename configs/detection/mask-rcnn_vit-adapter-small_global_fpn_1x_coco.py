_base_ = ['./mask-rcnn_vit-adapter-small_window_fpn_1x_coco.py']

model = dict(backbone=dict(window_block_indexes=[]))
