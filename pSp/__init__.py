"""pSp, the encoder that inverts a face in one pass (Richardson et al. 2021, arXiv 2008.00951), for W, W+ and W++.

encoders.py  the networks              psp.py       encoder + generator, reading and writing their checkpoint
losses.py    what training minimises   ranger.py    the published optimiser
data.py      data-set types and paths  training/trainer.py  one step, validation, the loop
inference.py folder of faces -> latents, pictures, metrics
scripts/     the published command lines: train.py, inference.py
"""
