"""Model families, in the shape transformers gives its own. Nothing is defined here."""
