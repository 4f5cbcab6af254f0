_base_ = ['./faster-rcnn_vrwkv-adapter-nano_fpn_1xb2-20e_bccd.py']

# mlp_ratio: a VRWKV layer has 13 products of width x width, and a ViT layer with ratio 4 has 12.
model = dict(backbone=dict(type='ViTAdapter', num_heads=2, mlp_ratio=4.5))
