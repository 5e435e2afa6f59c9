from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

# `type='mmslide.SlidePVT'` in any config finds this registry by its scope, and the classes by their location.
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmslide', locations=['mmslide.models'])
