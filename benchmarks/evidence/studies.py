"""The paper's tasks and the optimizers that are compared on each.

Horizons are where a contender was expected to be as good as the baseline when the protocol was fixed; whether it is,
the results say.
"""

from __future__ import annotations

from benchmarks.evidence.protocol import Contender, Study

GPT = Study(
    name="gpt",
    title="language model, byte GPT of 3.3M parameters",
    program="pretrain_gpt.py",
    arguments=("--autocast", "--eval-windows", "400"),
    corpus="gutenberg",
    steps=400,
    small_steps=100,
    contenders=(
        Contender("AdamW", "gpt_zero2_adamw.json", (1e-3, 2e-3, 4e-3)),
        Contender("Muon", "gpt_muon.json", (2e-3, 4e-3, 8e-3), horizon=0.45),
        Contender("Shampoo", "gpt_zero2_shampoo.json", (2e-3, 4e-3, 8e-3), horizon=0.4),
    ),
)

STUDIES = (GPT,)
