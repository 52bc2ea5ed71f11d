"""scorer/training.py and evaluation.py: masked losses, augmentation, a step, accuracy, calibration."""

import math

import numpy as np
import pytest
import torch
from scorers import AGE, SMILE, VALUE, smooth_faces, write_csv

from scorer.evaluation import accuracy_report, calibration_error, format_report, measure
from scorer.interface import expected_age
from scorer.labels import AGE_BINS, read_labels
from scorer.network import ScorerConfig
from scorer.training import (
    ScorerSettings,
    ScorerTrainer,
    age_distribution,
    attribute_losses,
    augment_faces,
    calibrate,
    label_losses,
)


def test_expected_age_by_closed_form():
    assert expected_age(torch.zeros(1, AGE_BINS)).item() == pytest.approx(50)
    logits = torch.full((1, AGE_BINS), -1e4)
    logits[0, 20], logits[0, 40] = 0.0, math.log(3)
    assert expected_age(logits).item() == pytest.approx(20 / 4 + 40 * 3 / 4)


def test_age_distribution():
    target = age_distribution(torch.tensor([40.0, 33.25, 0.0]))
    assert torch.allclose(target.sum(1), torch.ones(3))
    means = target @ torch.arange(101.0)
    assert means[:2].tolist() == pytest.approx([40, 33.25], abs=1e-3)
    assert target[2].argmax() == 0


def test_missing_labels_cost_nothing_and_move_nothing():
    torch.manual_seed(0)
    attributes = (AGE, SMILE, VALUE)
    outputs = torch.randn(4, 103, requires_grad=True)
    nan = math.nan
    values = torch.tensor([[30.0, 1.0, nan], [nan, 0.25, 12.0], [nan, nan, nan], [60.0, nan, 2.0]])
    weights = torch.where(values.isfinite(), torch.tensor([1.0, 0.5, 2.0]), 0.0)
    losses = label_losses(outputs, values, attributes)
    assert torch.equal(losses == 0, values.isnan())
    attribute_losses(outputs, values, weights, attributes, torch.tensor([0.5, 0.25, 1.0])).sum().backward()
    assert outputs.grad.isfinite().all()
    gone = values.isnan()
    assert outputs.grad[:, :101][gone[:, 0]].abs().sum() == 0
    assert outputs.grad[:, 101:][gone[:, 1:]].abs().sum() == 0
    assert (outputs.grad[:, 101:][~gone[:, 1:]] != 0).all()


def test_losses_by_closed_form():
    outputs = torch.cat((torch.zeros(2, AGE_BINS), torch.tensor([[0.0, 0.5], [2.0, 0.0]])), 1)
    values = torch.tensor([[50.0, 1.0, 16.0], [50.0, 0.0, 10.0]])
    losses = label_losses(outputs, values, (AGE, SMILE, VALUE))
    target = age_distribution(torch.tensor([50.0]))[0]
    divergence = (target * (target.clamp(min=1e-30).log() + math.log(AGE_BINS))).sum().item()
    assert losses[:, 0].tolist() == pytest.approx([0.5 * divergence] * 2, rel=1e-4)  # the expected value is exact
    assert losses[:, 1].tolist() == pytest.approx([math.log(2), 2 + math.log1p(math.exp(-2))], rel=1e-5)
    assert losses[:, 2].tolist() == pytest.approx([0.5, 0.0])  # (16 - 10) / 4 = 1.5, Huber's |1.5 - 0.5| - 0.5
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    summed = attribute_losses(outputs, values, weights, (AGE, SMILE, VALUE), weights.mean(0))
    expected = (weights * losses).sum(0) / weights.sum(0)
    assert torch.allclose(summed, expected)


def test_augmentation_is_seeded_and_in_range():
    images = smooth_faces(12, 64)
    before = images.clone()
    first, again, other = (augment_faces(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(images, before)
    assert first.shape == images.shape and first.abs().max() <= 1 and first.isfinite().all()
    assert augment_faces(images[:1], torch.Generator().manual_seed(0)).shape == (1, 3, 64, 64)
    assert augment_faces(smooth_faces(6, 32), torch.Generator().manual_seed(0)).shape == (6, 3, 32, 32)


def test_labels_decide_what_is_learnt():
    """Same images, opposite labels: the loss falls for both."""
    images = (smooth_faces(16, 32).mul(127.5).add(127.5)).byte()
    values = torch.arange(16).remainder(2).float()[:, None]
    trainer = ScorerTrainer(ScorerConfig((SMILE,), width=0.5, input_size=32), ScorerSettings(25, 16), [1.0])
    losses = [float(trainer.train_step(images, values, torch.ones(16, 1))) for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert trainer.learning_rate() < 0.1 * trainer.settings.lr


# -- accuracy and calibration --------------------------------------------------------------------------------------


def test_accuracy_by_closed_form():
    labels = np.array([0, 0, 1, 1])
    assert measure(SMILE, [0.1, 0.4, 0.35, 0.8], labels)["auc"] == pytest.approx(0.75)
    assert measure(SMILE, [0.5] * 4, labels)["auc"] == pytest.approx(0.5)
    assert measure(SMILE, [0.9, 0.1, 0.8, 0.7], labels)["balanced_accuracy"] == pytest.approx(0.75)
    alone = measure(SMILE, [0.1, 0.2], [1, 1])
    assert math.isnan(alone["auc"]) and math.isnan(alone["balanced_accuracy"])
    assert calibration_error([0.05, 0.05, 0.95, 0.95], [0, 0, 1, 0]) == pytest.approx(0.5 * 0.05 + 0.5 * 0.45)
    assert calibration_error([1.0, 0.0], [1, 0]) == 0
    found = measure(AGE, np.array([20.0, 30, 44]), np.array([10.0, 30, 50]))
    assert found["mae"] == pytest.approx(16 / 3) and found["bias"] == pytest.approx(4 / 3)
    assert found["slope"] == pytest.approx(0.6) and found["mae_10_19"] == 10
    assert found["within_5"] == pytest.approx(1 / 3)
    assert measure(AGE, np.array([20.0]), np.array([10.0]))["n"] == 1


def test_report_of_labelled_faces_alone(tmp_path):
    path = write_csv(tmp_path / "l.csv", ["file", "age", "smile"], ["1", "10", "1"], ["2", "20", "0"], ["3", "", "1"])
    report = accuracy_report(np.array([[12.0, 0.9], [25, 0.2], [50, 0.6]]), read_labels(path))
    assert (report["age"]["n"], report["age"]["mae"], report["smile"]["n"]) == (2, 3.5, 3)
    assert "3.500" in format_report(report)


def test_calibration_recovers_a_planted_one():
    generator = torch.Generator().manual_seed(0)
    n = 4000
    truth = torch.randn(n, generator=generator) * 2
    smile = torch.bernoulli(truth.sigmoid(), generator=generator)
    years = torch.randint(20, 60, (n,), generator=generator).float()
    bins = torch.arange(101.0)
    seen = years + 6 * torch.randn(n, generator=generator)
    logits = -0.5 * ((bins - seen[:, None]) / 3).square()  # twice too sure: the truth has sigma 6, scale 1/4
    outputs = torch.cat((logits, (truth[:, None] + 1) * 2), 1)
    values = torch.stack((years, smile), 1)
    found = calibrate(outputs, values, torch.ones(n, 2), (AGE, SMILE))
    assert found["smile"] == (pytest.approx(0.5, abs=0.04), pytest.approx(-1, abs=0.1))
    assert found["age"] == (pytest.approx(0.25, abs=0.03), 0.0)
    few = calibrate(outputs[:5], values[:5], torch.ones(5, 2), (AGE, SMILE))
    assert few == {"age": (1.0, 0.0), "smile": (1.0, 0.0)}
