"""Training of the generator: losses, one step, the loop, resuming, transfer, augmentation, auxiliary networks."""
