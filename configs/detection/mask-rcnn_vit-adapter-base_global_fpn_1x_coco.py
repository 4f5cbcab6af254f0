_base_ = ['./mask-rcnn_vit-adapter-base_window_fpn_1x_coco.py']

model = dict(backbone=dict(window_block_indexes=[]))
