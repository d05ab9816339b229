"""LipViT: a Lipschitz vision transformer. Import from its modules, or from ``hf_lipschitz``."""
