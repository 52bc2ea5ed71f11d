"""Which precision pays is measured, not read from the processor's flags."""

import time

import pytest
import torch

from common.precision import bf16_pays


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_faster_type_pays(monkeypatch, slow):
    def convolve(images, weight, padding):
        assert images.dtype == weight.dtype and padding == 1
        end = time.process_time() + (0.004 if images.dtype == slow else 0.001)
        while time.process_time() < end:
            pass

    monkeypatch.setattr("common.precision.F.conv2d", convolve)
    assert bf16_pays() == (slow == torch.float32)
