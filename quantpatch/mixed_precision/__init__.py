"""Mixed precision: the recipe of each layer that keeps a model's metric and makes it cheapest.

==================  ==================================================================
search.py           ``search``
layers.py           the layers that are searched, and which of them share a format
formats.py          their quantizers, for each candidate
costs.py            what a layer costs in a format
outputs.py          how far outputs are from those in float
task.py             all that is known before a configuration is evaluated
strategy.py         which configuration to try next
evaluations.py      what ``evaluate`` returns, how often it may be asked
result.py           what was found, as tables and a picture
==================  ==================================================================
"""

from quantpatch.mixed_precision.result import SearchPoint, SearchResult, SearchRow
from quantpatch.mixed_precision.search import search

__all__ = ["SearchPoint", "SearchResult", "SearchRow", "search"]
