"""The figures of Xun, Gupta and Price (NeurIPS 2025, arXiv 2510.26324), recomputed: ``python -m benchmarks.paper``.

One module per figure, each with ``NAME``, ``TITLE``, ``compute(quick) -> data``, ``draw(data, path)`` and
``text(data)``, the Markdown that stands below the figure in ``docs/paper.md``.
"""
