"""One shared concern per module."""
