"""Inversion by optimisation: the pure function, and what its command line and pSp's share around it.

projection.py  project(): images -> codes and noise maps      pictures.py  folder, files or LMDB -> named pictures
measures.py    how close a reconstruction is, per image       sheets.py    sheets with difference maps, loss curves
store.py       finished images on disk, merged at the end
"""
