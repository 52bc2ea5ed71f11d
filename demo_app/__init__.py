"""The page behind demo.py."""
