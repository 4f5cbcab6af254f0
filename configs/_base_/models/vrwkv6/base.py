_base_ = ['../vrwkv/base.py']

model = dict(backbone=dict(type='VRWKV6', num_heads=12))
