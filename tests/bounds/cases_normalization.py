"""Rows for normalisation layers."""

from __future__ import annotations

from tests.bounds.row import Row

ROWS: tuple[Row, ...] = ()
