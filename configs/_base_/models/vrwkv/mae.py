# MAE. A config adds the width and the depth of the encoder.
model = dict(
    type='MAE',
    backbone=dict(
        type='MAEVRWKV',
        img_size=224,
        patch_size=16,
        mask_ratio=0.75,
        drop_path_rate=0.1,
        init_values=1e-5,
        post_norm=True,
        key_norm=True,
    ),
    neck=dict(
        type='MAEVRWKVDecoder',
        num_patches=196,
        patch_size=16,
        decoder_embed_dims=512,
        decoder_depth=8,
        drop_path_rate=0.1,
        init_values=1e-5,
        post_norm=True,
        key_norm=True,
    ),
    head=dict(
        type='MAEPretrainHead',
        patch_size=16,
        # The targets are raw pixels. With True, each patch is normalised by its mean and deviation.
        norm_pix=False,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
)
