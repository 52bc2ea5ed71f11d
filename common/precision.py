"""The torch types that the names of --precision stand for."""

import torch

from common.cli import PRECISIONS

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
