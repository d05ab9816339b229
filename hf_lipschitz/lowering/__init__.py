"""Foreign torch models read as bound programs; ``lower.py`` is the way in. Nothing is defined here."""
