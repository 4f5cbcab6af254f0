_base_ = ['../vrwkv/tiny.py']

model = dict(backbone=dict(type='VRWKV6', num_heads=3))
