"""Photos to aligned faces: detect, align, paste back."""
