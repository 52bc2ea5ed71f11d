"""The torch types that the names of --precision stand for, and which of them pays on this processor."""

import platform
import re
from pathlib import Path
from time import process_time
from timeit import Timer

import torch
import torch.nn.functional as F

from common.cli import PRECISIONS

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
CPU_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Model of the processor, where Linux tells it; else what Python knows of it."""
    found = re.search(r"model name\s*: (.*)", CPU_INFO.read_text() if CPU_INFO.is_file() else "")
    return found[1] if found else platform.processor() or platform.machine()


def bf16_pays() -> bool:
    """Whether convolutions are faster in bfloat16 than in float32 on this processor, by a measurement of 0.3 s. Its
    flags do not tell: of two with AVX512-BF16, without AMX, one is twice as fast in bfloat16 and one half as fast."""
    image, weight = torch.randn(4, 64, 64, 64), torch.randn(64, 64, 3, 3)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype, memory_format=torch.channels_last) for x in (image, weight)]
        timer = Timer("conv2d(*inputs, padding=1)", timer=process_time, globals={"conv2d": F.conv2d, "inputs": inputs})
        seconds.append(min(timer.repeat(10, 1)))
    return seconds[1] < seconds[0]
