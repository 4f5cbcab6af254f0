_base_ = ['./upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py']

model = dict(backbone=dict(type='VRWKV6Adapter', num_heads=3))
