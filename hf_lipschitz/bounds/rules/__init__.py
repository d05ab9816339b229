"""One file a kind of operation; ``table.py`` lists them. Nothing is defined here."""
