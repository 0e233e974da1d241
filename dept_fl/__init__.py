"""DEPT: decoupled embeddings for pre-training language models, federated with Flower.

A silo is a place: its data, tokenizer, embeddings and training state stay there.
The transformer body is a traveller: it alone is sent and averaged.

Reading order: rounds, silo, variants, train, outer; then records and strategy.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The folder of pyproject.toml and conf/: in a checkout, and in Flower's copy of the app, that of
# the package; a wheel has them within the package.
ROOT = PACKAGE / "project" if (PACKAGE / "project").is_dir() else PACKAGE.parent

__version__: str = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

# Some architectures of transformers would fetch code for faster kernels from the hub, wherever the
# package `kernels` is installed: no model that a server names may do that.
os.environ.setdefault("USE_HUB_KERNELS", "OFF")
