"""Files of other programs: NVIDIA's pickles, other repositories' latents and checkpoints."""
