"""What `mmengine.hub.get_model` calls in the package that a config comes from."""

from mmslide.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, WEIGHT_INITIALIZERS


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers everything that configs can name.

    Args:
        init_default_scope: ignored, since a config of mmslide's has the scope of mmdet, mmseg or mmpretrain.
    """
    for registry in (MODELS, WEIGHT_INITIALIZERS, HOOKS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS):
        registry.import_from_location()
