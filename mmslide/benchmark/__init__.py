from .cost import Cost, measure_cost, plot_cost
from .exported import compare_exported
from .measure import Machine, Measurement, Side, compare, measure_machine
from .pairs import BACKBONES, Pair, backbone_pair, model_pair, neighborhood_pair, op_pair

__all__ = [
    'BACKBONES',
    'Cost',
    'Machine',
    'Measurement',
    'Pair',
    'Side',
    'backbone_pair',
    'compare',
    'compare_exported',
    'measure_cost',
    'measure_machine',
    'model_pair',
    'neighborhood_pair',
    'op_pair',
    'plot_cost',
]
