_base_ = ['./vrwkv-nano_1xb64-15e_cifar10.py']

model = dict(backbone=dict(type='VRWKV6', num_heads=2))
