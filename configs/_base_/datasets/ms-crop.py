# Swin's augmentation, after DETR: half of the images are resized once, half are resized, cropped and resized again.
short_sides = dict(type='RandomChoiceResize', scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True)
multi_scale_crop = dict(
    type='RandomChoice',
    transforms=[
        [short_sides],
        [
            dict(type='RandomChoiceResize', scales=[(side, 1333) for side in (400, 500, 600)], keep_ratio=True),
            dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
            short_sides,
        ],
    ],
)
