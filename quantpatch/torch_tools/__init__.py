"""What PyTorch lacks and several rooms need; nothing here knows quantization.

===================  ============================================================================
forward.py           a model run on a batch
paused.py            runs that wait at modules
nn.py                torch's classes, whatever stands under their names
class_swap.py        classes made on demand, and modules that change class
fast_paths.py        computations of torch's that read weights past their layers
fx.py                layers as leaves of a traced graph
distributed.py       what all ranks have to agree on
sharded.py           parameters that are spread over ranks
atomic_files.py      files that are written whole or not at all
raised.py            errors that a plugin's code raised
debug_trace.py       what blocks did, printed
===================  ============================================================================
"""

__all__: list[str] = []
