"""Moving latent codes so that one attribute of the picture changes."""
