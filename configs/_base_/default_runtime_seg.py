_base_ = ['mmseg::_base_/default_runtime.py']

custom_imports = dict(imports=['vrwkv_seg'], allow_failed_imports=False)

# Heads of another number of classes than the data set's would fail in a loss, or not at all.
custom_hooks = [dict(type='NumClassCheckHook')]
