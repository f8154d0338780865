"""For the tests of plugin authors: what a quantized layer owes its float class, as checks.

``assert_layer_conforms`` makes them on one layer; ``pytest --quantpatch-conformance`` on every entry of the
installed plugins, from the examples that they give through the hook ``quantpatch_examples``. The pytest
plugin itself is ``pytest_quantpatch``, a module beside this package: pytest imports it in every run of
every project, and it must not bring torch along.
"""

from quantpatch.testing.checks import CHECKS, Check
from quantpatch.testing.kit import Trial, assert_layer_conforms, run_check, trials
from quantpatch.testing.subject import NotApplicable, Subject

__all__ = [
    "CHECKS",
    "Check",
    "NotApplicable",
    "Subject",
    "Trial",
    "assert_layer_conforms",
    "run_check",
    "trials",
]
