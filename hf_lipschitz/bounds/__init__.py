"""The trusted kernel: standard library and NumPy only. It defines nothing here; import its modules by name."""
