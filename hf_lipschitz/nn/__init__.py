"""Lipschitz layers in torch: each states its forward and, next to it, the kernel operations it is made of."""
