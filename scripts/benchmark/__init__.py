"""The parts of ``scripts/benchmark.py``: mlmx beside the published recipe, measured in turns.

1. `rows`: what is measured, and what it must reach. `growth`: how cost grows with size.
2. `workers`: each side runs in a process of its own, so that neither profits from the other's settings, and works
   only when it is its turn. `stock` and `ours` hold the same functions, one file for each side.
3. `report`: the readings as JSON and as Markdown.
"""
