"""Runs side by side: what differs, which is better, by how much, and which of them must not be ranked together.

Read from run folders alone. Light to import: `compare` answers without torch and MLflow, and numpy waits until there
are sums per document to be drawn from.
"""

from mlmx.comparison.curves import plain_curves
from mlmx.comparison.readings import Row
from mlmx.comparison.tables import Group, Table, tabulate
from mlmx.comparison.text import csv_text, markdown, plain, remarks, rich_table

__all__ = [
    "Group",
    "Row",
    "Table",
    "csv_text",
    "markdown",
    "plain",
    "plain_curves",
    "remarks",
    "rich_table",
    "tabulate",
]
