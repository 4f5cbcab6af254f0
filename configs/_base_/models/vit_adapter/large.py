_base_ = ['./base.py']

backbone = dict(
    # Of the pre-trained weights; the position embedding is resized in forward.
    img_size=384,
    embed_dims=1024,
    depth=24,
    num_heads=16,
    drop_path_rate=0.4,
    deform_num_heads=16,
    interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
    # ImageNet-22K, then fine-tuned on ImageNet-1K: the weights of 22K alone are not released in
    # mmpretrain's names.
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-large-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-b20ba619.pth'
    ),
)
