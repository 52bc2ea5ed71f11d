"""pSp, the encoder that inverts a face in one pass (Richardson et al. 2021, arXiv 2008.00951), for W, W+ and W++.

encoders.py      the networks                        psp.py      encoder + generator, reading and writing their file
data_configs.py  data-set types and paths            losses.py   what training minimises
coach.py         one step, validation, the loop      ranger.py   the published optimiser
inference.py     folder of faces -> w, images, metrics
scripts/         the published command lines, train.py and inference.py, and export.py
"""
