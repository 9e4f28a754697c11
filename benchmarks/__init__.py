"""Benchmarks: they train the models of launch/, whose modules find each other as its programs do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
