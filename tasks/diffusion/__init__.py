"""The generator: Stable Diffusion sampled step by step, its LoRA, and how failures tune it (Eq. 3-8)."""
