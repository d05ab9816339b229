"""Optimizers that know about norms: which parameter carries which constraint, keeping it true, and ``SpectralMuon``."""
