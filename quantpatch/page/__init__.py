"""The page about a model: one HTML file.

=================  ====================================================
page.py            ``report``
sections.py        its tables, out of the library's reports
charts.py          its pictures
seen.py            what quantizers see in a run
=================  ====================================================
"""

from quantpatch.page.page import report

__all__ = ["report"]
