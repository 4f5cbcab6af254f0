_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)

# 300 epochs of Base would fill 330 GB.
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3),
    classes=dict(type='ClassCheckHook'),
)
