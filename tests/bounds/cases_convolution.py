"""Rows for convolutions."""

from __future__ import annotations

from tests.bounds.row import Row

ROWS: tuple[Row, ...] = ()
