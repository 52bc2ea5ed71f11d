"""align_faces.py from a test: its command, and its report."""

import csv

import align_faces
from common.cli import run


def align_cli(photos, out, *flags):
    argv = ["--photos", str(photos), "--output_dir", str(out), "--size", "64", "--n_worker", "1", *map(str, flags)]
    return run(align_faces.main, align_faces.build_parser(), argv)


def read_report(out):
    with open(out / "report.csv", encoding="utf-8-sig", newline="") as file:
        return {row["photo"]: row for row in csv.DictReader(file)}


def read_report_bytes(out):
    with open(out / "report.csv", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return {row["photo"]: row for row in csv.DictReader(file)}
