_base_ = ['./mask-rcnn_vrwkv-adapter-nano_fpn_1xb8-10e_digit-scenes.py']

model = dict(backbone=dict(type='VRWKV6Adapter', num_heads=3))
