_base_ = ['../vrwkv/small.py']

model = dict(backbone=dict(type='VRWKV6', num_heads=6, init_values=1e-5))
