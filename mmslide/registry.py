from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

# For `type='mmslide.SlidePVT'` in a config, mmengine finds this registry by its scope and the classes by location.
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmslide', locations=['mmslide.models'])
WEIGHT_INITIALIZERS = Registry(
    'weight initializer',
    parent=MMENGINE_WEIGHT_INITIALIZERS,
    scope='mmslide',
    locations=['mmslide.models.initializers'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmslide', locations=['mmslide.hooks'])
OPTIM_WRAPPERS = Registry('optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='mmslide', locations=['mmslide.amp'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmslide',
    locations=['mmslide.layer_decay'],
)
