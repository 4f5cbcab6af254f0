_base_ = ['mmseg::_base_/models/upernet_r50.py', './vrwkv_adapter/tiny.py']

# For ADE20K.
model = dict(
    # Images smaller than a crop are filled up; where whole images are tested, to multiples of 32,
    # as the adapter needs them.
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(_delete_=True, **_base_.pop('backbone'), fuse='stages'),
    decode_head=dict(in_channels=[192, 192, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
