_base_ = ['mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['vrwkv_det'], allow_failed_imports=False)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
# Heads of another number of classes than the data set's would fail in a loss, or not at all.
custom_hooks = [dict(type='NumClassCheckHook')]
