"""What tests need beyond the library itself, for this project and for packages built on it."""
