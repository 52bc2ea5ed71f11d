"""pSp, the encoder that inverts a face in one pass (Richardson et al. 2021, arXiv 2008.00951), for W, W+ and W++."""
