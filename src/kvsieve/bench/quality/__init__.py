"""How often a compressed cache still answers right: reference-model tasks, paired with full."""
