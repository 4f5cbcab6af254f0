_base_ = ['./upernet_vrwkv-adapter.py', './vit_adapter/tiny.py']

model = dict(backbone=_base_.pop('backbone'))
