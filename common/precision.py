"""The torch types that the names of --precision stand for, and which of them pays on this processor."""

from pathlib import Path

import torch

from common.cli import PRECISIONS

DTYPES = dict(zip(PRECISIONS, (torch.float32, torch.bfloat16, torch.float16), strict=True))
CPU_INFO = Path("/proc/cpuinfo")


def describe_processor() -> dict[str, str]:
    """Linux's description of the last processor ("model name", "flags" ...); {} elsewhere."""
    pairs = (line.partition(":") for line in CPU_INFO.read_text().splitlines()) if CPU_INFO.is_file() else ()
    return {key.strip(): value.strip() for key, _, value in pairs}


def bf16_pays() -> bool:
    """Whether this processor has instructions for bfloat16 (AVX512-BF16 or AMX), so that --precision bf16 is faster."""
    return bool({"avx512_bf16", "amx_bf16"} & set(describe_processor().get("flags", "").split()))
