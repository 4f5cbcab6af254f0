# GeoTIFFs of four bands, which demo/digit_rasters.py writes; docs/rasters.md explains the steps.
_base_ = './upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py'
data_root = 'data/digit_rasters'

# Written by tools/analysis_tools/band_statistics.py for data/digit_rasters/images/training.
model = dict(
    data_preprocessor=dict(
        mean=[2915.01, 2782.24, 2517.85, 2879.55],
        std=[2937.43, 2760.22, 2863.11, 2462.74],
        bgr_to_rgb=False,
    ),
    backbone=dict(in_channels=4),
)

train_pipeline = [
    dict(type='LoadRaster'),
    dict(type='LoadRasterAnnotations'),
    dict(type='PackSegInputs'),
]
test_pipeline = train_pipeline
rasters = dict(data_root=data_root, img_suffix='.tif', seg_map_suffix='.tif')
train_dataloader = dict(dataset=dict(**rasters, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**rasters, pipeline=test_pipeline))
test_dataloader = val_dataloader
del rasters
