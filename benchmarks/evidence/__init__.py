"""The evidence: real training jobs of the paper's tasks under several optimizers, and what came of them."""
