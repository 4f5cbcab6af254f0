_base_ = ['./upernet_vrwkv-adapter-nano_1xb4-2k_camvid-360x480.py']

# mlp_ratio: a VRWKV layer has 13 products of width x width, and a ViT layer with ratio 4 has 12.
model = dict(backbone=dict(type='ViTAdapter', num_heads=2, mlp_ratio=4.5))
