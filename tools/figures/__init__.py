"""Figures like the paper's: sheet.py lays pictures out with words around them, lab.py holds networks, faces and their
inversions, plates.py and expressions.py are the figures. tools/make_figures.py is the command line."""
