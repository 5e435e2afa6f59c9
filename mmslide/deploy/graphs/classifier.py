from typing import Any

from torch import Tensor

from .base import Exportable


class ExportableClassifier(Exportable):
    """mmpretrain's ImageClassifier: the image (1, 3, H, W) to scores (1, classes), the softmax of the head.

    Raises:
        ValueError: the classifier or its head has custom prediction code.
    """

    output_names = ('scores',)

    def __init__(self, classifier: Any) -> None:
        from mmpretrain.models import ImageClassifier
        from mmpretrain.models.heads import ClsHead

        super().__init__()
        if type(classifier) is not ImageClassifier:
            raise ValueError(
                f'only classifiers of type ImageClassifier can be exported, got {type(classifier).__name__}'
            )
        head = type(classifier.head)
        if (
            getattr(head, '_get_predictions', None) is not ClsHead._get_predictions
            or head.predict is not ClsHead.predict
        ):
            raise ValueError(f"only heads with ClsHead's predict can be exported, got {head.__name__}")
        self.classifier = classifier

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.classifier.head(self.classifier.extract_feat(image)).softmax(1),)
