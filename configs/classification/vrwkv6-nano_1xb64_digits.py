_base_ = ['./vrwkv-nano_1xb64_digits.py']

model = dict(backbone=dict(type='VRWKV6', num_heads=3))
