"""The paper's tasks and the optimizers that are compared on each.

Horizons are where a contender was expected to be as good as the baseline when the protocol was fixed; whether it is,
the results say. Contenders that are expected to be alike have the same horizon, so that they can be compared too;
the baseline runs on a schedule of that length besides.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.evidence.protocol import Contender, Study

# What made the best use of the statistics in the search on the small GPT; docs/evidence.md has what else was tried.
SPECTRAL = (
    ("preconditioner", "spectral"),
    ("direction_rms", 0.2),
    ("statistics_beta", 0.95),
    ("root_interval", 50),
    ("root_delay", 5),
)

BF16_ITERATIONS = ("matmul_precision", "medium")


def long_and_short(baseline: Contender, horizon: float) -> tuple[Contender, Contender]:
    """A baseline, and the same given no more steps than the contenders: what a short schedule does by itself."""
    return baseline, replace(baseline, name=f"short {baseline.name}", horizon=horizon)


GPT = Study(
    name="gpt",
    title="Language model: byte GPT of 3.3M parameters",
    program="pretrain_gpt.py",
    arguments=("--autocast", "--eval-windows", "400"),
    corpus="gutenberg",
    steps=1000,
    small_steps=100,
    evaluations=40,
    batch=8,
    contenders=(
        *long_and_short(Contender("AdamW", "gpt_zero2_adamw.json", (1e-3, 2e-3, 4e-3)), 0.4),
        Contender("Muon", "gpt_muon.json", (4e-3, 8e-3, 16e-3), horizon=0.4),
        Contender("Shampoo", "gpt_zero2_shampoo.json", (2e-3, 4e-3, 8e-3), horizon=0.4),
        Contender("Spectral", "gpt_zero2_shampoo.json", (8e-3, 16e-3, 32e-3), horizon=0.4, overrides=SPECTRAL),
    ),
)

GPT_12M = Study(
    name="gpt_12m",
    title="Language model: byte GPT of 13M parameters",
    program="pretrain_gpt.py",
    arguments=("--autocast", "--eval-windows", "400", "--layers", "4", "--d-model", "512", "--heads", "8"),
    corpus="gutenberg",
    steps=600,
    small_steps=40,
    evaluations=20,
    batch=8,
    contenders=(
        *long_and_short(Contender("AdamW", "gpt_zero2_adamw.json", (5e-4, 1e-3, 2e-3)), 0.4),
        Contender("Muon", "gpt_muon.json", (2e-3, 4e-3, 8e-3), horizon=0.4),
        Contender("Shampoo", "gpt_zero2_shampoo.json", (2e-3, 4e-3, 8e-3), horizon=0.4),
        Contender(
            "Spectral, blocks of 256", "gpt_zero2_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.4, overrides=SPECTRAL
        ),
        Contender(
            "Spectral",
            "gpt_zero2_shampoo.json",
            (4e-3, 8e-3, 16e-3),
            horizon=0.4,
            overrides=(*SPECTRAL, ("block_size", 512), BF16_ITERATIONS),
        ),
    ),
)

TRANSLATION = Study(
    name="translation",
    title="Translation from English to German: encoder-decoder transformer of 6M parameters",
    program="train_translation.py",
    arguments=("--autocast",),
    corpus="help_en_de",
    steps=400,
    small_steps=60,
    evaluations=20,
    contenders=(
        *long_and_short(Contender("AdamW", "translation_adamw.json", (5e-4, 1e-3, 2e-3)), 0.5),
        Contender("Muon", "translation_muon.json", (2e-3, 4e-3, 8e-3), horizon=0.5),
        Contender("Shampoo", "translation_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.5),
        Contender("Spectral", "translation_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.5, overrides=SPECTRAL),
    ),
)

BERT = Study(
    name="bert",
    title="Masked language model: BERT of 4.3M parameters",
    program="pretrain_bert.py",
    arguments=("--autocast",),
    corpus="python_docs",
    steps=300,
    small_steps=60,
    evaluations=20,
    contenders=(
        *long_and_short(Contender("AdamW", "bert_adamw.json", (5e-4, 1e-3, 2e-3)), 0.7),
        Contender("Muon", "bert_muon.json", (2e-3, 4e-3, 8e-3), horizon=0.7),
        Contender("Shampoo", "bert_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.7),
        Contender("Spectral", "bert_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.7, overrides=SPECTRAL),
    ),
)

CLICKS = Study(
    name="clicks",
    title="Click-through: DLRM",
    program="train_dlrm.py",
    arguments=(),
    corpus="flights",
    steps=400,
    small_steps=50,
    contenders=(
        *long_and_short(Contender("AdamW", "dlrm_adamw.json", (1e-3, 2e-3, 4e-3)), 0.65),
        Contender("Muon", "dlrm_muon.json", (4e-3, 8e-3, 16e-3), horizon=0.65),
        Contender("Shampoo", "dlrm_shampoo.json", (2e-3, 4e-3, 8e-3), horizon=0.65),
        Contender("Spectral", "dlrm_shampoo.json", (4e-3, 8e-3, 16e-3), horizon=0.65, overrides=SPECTRAL),
    ),
)

IMAGES = Study(
    name="images",
    title="Images: residual network of 0.1M parameters",
    program="train_resnet.py",
    arguments=("--autocast", "--width", "16"),
    corpus="fashion_mnist",
    steps=200,
    small_steps=40,
    evaluations=20,
    contenders=(
        *long_and_short(Contender("SGD", "resnet_sgd.json", (0.2, 0.4, 0.8)), 0.75),
        Contender("AdamW", "resnet_adamw.json", (8e-3, 16e-3, 32e-3), horizon=0.75),
        Contender("Shampoo", "resnet_shampoo.json", (8e-3, 16e-3, 32e-3), horizon=0.75),
        Contender("Spectral", "resnet_shampoo.json", (8e-3, 16e-3, 32e-3), horizon=0.75, overrides=SPECTRAL),
    ),
)

# What rounding to bfloat16 costs, at the rates that the small GPT chose.
BF16_ROOTS, BF16_EXCHANGE = ("root_dtype", "bfloat16"), ("exchange_dtype", "bfloat16")

SHAMPOO_BF16 = replace(
    GPT,
    name="shampoo_bf16",
    title="Shampoo with less precision: byte GPT of 3.3M parameters",
    steps=400,
    small_steps=40,
    alike=True,
    contenders=(
        Contender("fp32", "gpt_zero2_shampoo.json", (4e-3,)),
        Contender("bf16 roots", "gpt_zero2_shampoo.json", (4e-3,), overrides=(BF16_ROOTS,)),
        Contender("bf16 exchange", "gpt_zero2_shampoo.json", (4e-3,), overrides=(BF16_EXCHANGE,)),
    ),
)

SPECTRAL_BF16 = replace(
    SHAMPOO_BF16,
    name="spectral_bf16",
    title="Spectral with less precision: byte GPT of 3.3M parameters",
    contenders=(
        Contender("fp32", "gpt_zero2_shampoo.json", (16e-3,), overrides=SPECTRAL),
        Contender("bf16 iterations", "gpt_zero2_shampoo.json", (16e-3,), overrides=(*SPECTRAL, BF16_ITERATIONS)),
        Contender(
            "bf16 iterations, roots and exchange",
            "gpt_zero2_shampoo.json",
            (16e-3,),
            overrides=(*SPECTRAL, BF16_ITERATIONS, BF16_ROOTS, BF16_EXCHANGE),
        ),
    ),
)

STUDIES = (GPT, TRANSLATION, BERT, CLICKS, IMAGES, GPT_12M, SHAMPOO_BF16, SPECTRAL_BF16)
