"""Moving latents so that one attribute of the image changes."""
