"""Rows for forms of attention."""

from __future__ import annotations

from tests.bounds.row import Row

ROWS: tuple[Row, ...] = ()
