"""The downstream classifier's parts: backbone, prototypes, training, predictions (paper, Settings)."""
