from .cost import Cost, measure_cost, plot_cost
from .exported import compare_exported
from .measure import Machine, Measurement, Side, compare, measure_machine
from .pairs import BACKBONES, Pair, backbone_pair, model_pair, neighborhood_pair, op_pair
from .runtimes import ExportedMeasurement, available_runtimes, measure_exported

__all__ = [
    'BACKBONES',
    'Cost',
    'ExportedMeasurement',
    'Machine',
    'Measurement',
    'Pair',
    'Side',
    'available_runtimes',
    'backbone_pair',
    'compare',
    'compare_exported',
    'measure_cost',
    'measure_exported',
    'measure_machine',
    'model_pair',
    'neighborhood_pair',
    'op_pair',
    'plot_cost',
]
