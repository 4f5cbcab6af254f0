_base_ = ['mmseg::_base_/models/upernet_r50.py']

# The adapter in place of ResNet-50, for ADE20K. A config adds its arguments, and its width to the
# heads.
model = dict(
    # Images smaller than a crop are padded to it. Where whole images are tested, they are padded to
    # multiples of 32, as the adapter needs them.
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(_delete_=True, fuse='stages'),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
