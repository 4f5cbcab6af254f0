_base_ = ['mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['vrwkv_det'], allow_failed_imports=False)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
# Checks that heads and data set have the same number of classes: a loss may not notice.
custom_hooks = [dict(type='NumClassCheckHook')]
