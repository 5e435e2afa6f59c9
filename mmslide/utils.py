"""Called by `mmengine.hub.get_model` in the package of a config."""

from mmslide.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, WEIGHT_INITIALIZERS


def register_all_modules(init_default_scope: bool = True) -> None:
    """Registers everything that configs can refer to.

    Args:
        init_default_scope: ignored, since mmslide's configs have the scope of mmdet, mmseg or mmpretrain.
    """
    for registry in (MODELS, WEIGHT_INITIALIZERS, HOOKS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS):
        registry.import_from_location()
