_base_ = ['./adapter.py']

backbone = dict(
    # The image size of the pre-trained weights; forward resizes the position embedding.
    img_size=384,
    embed_dims=1024,
    depth=24,
    num_heads=16,
    drop_path_rate=0.4,
    deform_num_heads=16,
    deform_ratio=0.5,
    interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
    # Pre-trained on ImageNet-22K and fine-tuned on ImageNet-1K. mmpretrain has no release of the
    # weights from ImageNet-22K alone.
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-large-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-b20ba619.pth'
    ),
)
