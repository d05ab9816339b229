"""Rows for pools over images."""

from __future__ import annotations

from tests.bounds.row import Row

ROWS: tuple[Row, ...] = ()
