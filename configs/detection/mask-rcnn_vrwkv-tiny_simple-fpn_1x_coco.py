_base_ = ['../_base_/recipes/mask-rcnn_fpn_1x_coco.py']

# VRWKV without the adapter, with ViTDet's pyramid from its last map.
model = dict(
    backbone=dict(
        _delete_=True,
        type='VRWKV',
        img_size=224,
        patch_size=16,
        embed_dims=192,
        depth=12,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth',
            prefix='backbone.',
        ),
    ),
    neck=dict(_delete_=True, type='SimpleFPN', in_channels=192, out_channels=256, num_outs=5),
)

optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
