_base_ = ['mmseg::_base_/models/upernet_r50.py']

# The paper's Tiny, for ADE20K.
model = dict(
    # Images smaller than a crop are filled up; where whole images are tested, to multiples of 32,
    # as the adapter needs them.
    data_preprocessor=dict(size=(512, 512), test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='VRWKVAdapter',
        img_size=224,
        patch_size=16,
        embed_dims=192,
        depth=12,
        init_values=1.0,
        drop_path_rate=0.1,
        conv_inplane=64,
        n_points=4,
        deform_num_heads=6,
        deform_ratio=1.0,
        cffn_ratio=0.25,
        interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]],
        fuse='stages',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192], num_classes=150),
    auxiliary_head=dict(in_channels=192, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)
