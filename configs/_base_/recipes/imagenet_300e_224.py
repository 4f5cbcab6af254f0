# ImageNet-1K: 300 epochs, batches of 1024 images of 224 x 224 pixels. A config adds the model, the
# learning rate and the weight decay.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../default_runtime_cls.py',
]
