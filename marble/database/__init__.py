"""Databases and tables: the same classes over an embedded node and over a cluster, which stand behind `Backend`."""

from marble.database.backend import Backend, Consistency, check_consistency, check_scan
from marble.database.database import Database
from marble.database.table import Scan, Table
from marble.database.transaction import Transaction
from marble.filters import columns_read, filter_batches

__all__ = [
    "Backend",
    "Consistency",
    "Database",
    "Scan",
    "Table",
    "Transaction",
    "check_consistency",
    "check_scan",
    "columns_read",
    "filter_batches",
]
