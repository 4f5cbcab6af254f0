_base_ = ['mmseg::_base_/default_runtime.py']

custom_imports = dict(imports=['vrwkv_seg'], allow_failed_imports=False)

# Checks that heads and data set have the same number of classes: a loss may not notice.
custom_hooks = [dict(type='NumClassCheckHook')]
