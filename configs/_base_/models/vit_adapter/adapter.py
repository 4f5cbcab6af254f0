_base_ = ['../vrwkv_adapter/adapter.py']

# The paper's baseline, with global attention in every layer. The layer scales start at 1, since
# the pre-trained weights have none.
backbone = dict(type='ViTAdapter', init_values=1.0)
