"""Images to facts: attributes, identity, alignment."""
