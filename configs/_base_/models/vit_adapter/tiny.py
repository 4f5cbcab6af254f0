_base_ = ['../vrwkv_adapter/tiny.py']

# The paper's baseline, with global attention in every layer.
backbone = dict(
    type='ViTAdapter',
    num_heads=3,
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth'
    ),
)
