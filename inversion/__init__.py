"""Inversion by optimisation: the pure function, and what surrounds it.

projector.py  project(): images -> w and noise maps    runner.py  invert_images(): a folder of results, resumable
inputs.py     folder, files or LMDB -> named images    report.py  tables, grids and loss curves of a finished run
"""
