"""Seeds to z to w to images."""
