"""Numbers for generators: each stamped with how it was computed, so that unlike ones are not compared."""
