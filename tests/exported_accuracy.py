"""AP or mIoU of exported models, by the data, pipeline and metrics of their config's test.

python tests/exported_accuracy.py CONFIG MODEL.onnx MODEL.xml ...
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

import mmslide  # noqa: F401
from mmslide.deploy.targets import find_target

Run = Callable[[Tensor], dict[str, Tensor]]


def evaluate(config: str | Path, path: str | Path) -> dict[str, float]:
    """The metrics of a whole detector or segmentor that `mmslide.deploy.export` wrote.

    No image may be larger than the size of the graph after the test pipeline.
    """
    exported = find_target(path).load(Path(path))

    def run(image: Tensor) -> dict[str, Tensor]:
        """Images of less than the graph's size are padded."""
        shape = image.shape[2:] if exported.metadata['dynamic'] else exported.metadata['shape']
        missing = [side - given for side, given in zip(shape, image.shape[2:], strict=True)]
        padded = F.pad(image, (0, missing[1], 0, missing[0]), value=exported.metadata['pad_value'])
        return {name: torch.from_numpy(x) for name, x in exported.run(padded.numpy()).items()}

    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.no_grad():
        loader = Runner.build_dataloader(cfg.test_dataloader)
        evaluator = Evaluator(cfg.test_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        model: Any = MODELS.build(cfg.model).eval()  # for all but the prediction
        if cfg.default_scope == 'mmdet':
            model.predict = lambda images, samples, **_: detections(run, images, samples)
        else:
            model.encode_decode = lambda image, _: run(image)['logits'][..., : image.shape[2], : image.shape[3]]
        for data in loader:
            evaluator.process(data_samples=model.test_step(data), data_batch=data)
        return evaluator.evaluate(len(loader.dataset))


def detections(run: Run, images: Tensor, samples: Sequence[Any]) -> Sequence[Any]:
    """mmdet's data samples with what is found, scaled back and pasted into the images as mmdet does it."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    for image, sample in zip(images, samples, strict=True):
        boxes, labels, scores, *masks = run(image[None]).values()
        kept = scores > 0
        boxes = boxes[kept] / torch.tensor(sample.scale_factor).repeat(2)
        sample.pred_instances = InstanceData(bboxes=boxes, labels=labels[kept], scores=scores[kept])
        if masks:
            pasted, _ = _do_paste_mask(masks[0][kept][:, None], boxes, *sample.ori_shape, skip_empty=False)
            sample.pred_instances.masks = pasted >= 0.5
    return samples


if __name__ == '__main__':
    results = {path: evaluate(sys.argv[1], path) for path in sys.argv[2:]}
    for path, metrics in results.items():
        print(path, *(f'{name} {value:.4f}' for name, value in metrics.items()), sep='\n  ')
