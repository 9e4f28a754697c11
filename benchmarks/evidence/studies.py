"""The tasks, and the optimizers that are compared on each: Muon first, then AdamW, both tuned as everybody is.

Steps are those of everyone's schedule; horizons beside it are run as far as they are needed to see where an optimizer
ends as Muon does. Rates are where searches begin.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.evidence.field import (
    ADAMW,
    ADAMW_BY_ROLE,
    FACEBOOK,
    MOMENTUM,
    MUON,
    POLAR,
    SHAMPOO,
    SOAP,
    UNTUNED,
    WARMUP,
    at,
)
from benchmarks.evidence.protocol import Contender, Study, Tuning
from benchmarks.evidence.search import Axis

# Whom every task is run for, and the first task besides.
FOREMOST = (MUON, ADAMW, ADAMW_BY_ROLE, POLAR, UNTUNED)
EVERYONE = (*FOREMOST, SHAMPOO, SOAP, FACEBOOK)
# A model beside its task's own.
FEWEST = (MUON, POLAR)

_MODERN = ("--autocast", "--architecture", "modern", "--mlp", "gated", "--eval-windows", "256")

# 64 windows of 256 tokens: 16,384 a step.
GPT_MODERN = Study(
    name="gpt_modern",
    title="Language model: GPT with rotary positions, RMSNorm, QK-norm and gated MLP, 3.5M parameters, bytes",
    program="pretrain_gpt.py",
    arguments=(*_MODERN, "--vocabulary", "bytes"),
    config="gpt_muon.json",
    corpus="gutenberg",
    steps=120,
    small_steps=20,
    evaluations=20,
    batch=64,
    tuning=Tuning("python_docs", steps=60, budget=6),
    contenders=EVERYONE,
)

GPT_MODERN_BPE = replace(
    GPT_MODERN,
    name="gpt_modern_bpe",
    title="Language model: the same GPT with BPE of 4,096 tokens, 5.5M parameters",
    arguments=(*_MODERN, "--vocabulary", "4096"),
    tuning=Tuning("python_docs", steps=60, budget=2, after="gpt_modern"),
    contenders=FEWEST,
)

GPT_MODERN_12M = replace(
    GPT_MODERN,
    name="gpt_modern_12m",
    title="Language model: the same GPT 512 wide, 13M parameters, bytes",
    arguments=(*_MODERN, "--vocabulary", "bytes", "--d-model", "512", "--heads", "8"),
    small_steps=8,
    tuning=Tuning("python_docs", steps=60, budget=2, after="gpt_modern"),
    contenders=FEWEST,
)

# 128 windows of 128 tokens.
BERT = Study(
    name="bert",
    title="Masked language model: BERT of 4.3M parameters",
    program="pretrain_bert.py",
    arguments=("--autocast",),
    config="bert_muon.json",
    corpus="python_docs",
    steps=150,
    small_steps=20,
    evaluations=30,
    batch=128,
    tuning=Tuning("gutenberg", steps=75, budget=6),
    contenders=FOREMOST,
)

# Some 16,000 tokens of both languages.
TRANSLATION = Study(
    name="translation",
    title="Translation from English to German: encoder-decoder transformer of 6M parameters",
    program="train_translation.py",
    arguments=("--autocast",),
    config="translation_muon.json",
    corpus="help_en_de_judged",
    steps=120,
    small_steps=20,
    evaluations=24,
    batch=384,
    tuning=Tuning("help_en_de_tuning", steps=60, budget=6),
    contenders=FOREMOST,
)

CLICKS = Study(
    name="clicks",
    title="Click-through: DLRM",
    program="train_dlrm.py",
    arguments=(),
    config="dlrm_muon.json",
    corpus="flights_judged",
    steps=300,
    small_steps=30,
    batch=2048,
    tuning=Tuning("flights_tuning", steps=150, budget=6),
    contenders=(
        *(at(contender, 4e-3, embedding_lr_scale=1.0) for contender in FOREMOST if contender.axes),
        UNTUNED,
    ),
)

SGD = Contender(
    "SGD",
    "SGD",
    {"lr": 0.4, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "scheduler.warmup_num_steps": 0.1},
    (
        Axis("lr", (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)),
        MOMENTUM,
        WARMUP,
        Axis("weight_decay", (0.0, 1e-4, 5e-4, 2e-3)),
    ),
)

# Nearly all of it convolutions, which torch's Muon and the prototypes leave to AdamW: those go without.
IMAGES = Study(
    name="images",
    title="Images: residual network of 0.1M parameters",
    program="train_resnet.py",
    arguments=("--autocast", "--width", "16"),
    config="resnet_adamw.json",
    corpus="fashion_mnist_judged",
    steps=150,
    small_steps=20,
    evaluations=20,
    batch=1024,
    tuning=Tuning("fashion_mnist_tuning", steps=75, budget=6),
    contenders=(at(ADAMW, 32e-3), SGD, at(POLAR, 32e-3), UNTUNED),
)


def _less_precise(contender: Contender, **variants: dict[str, str]) -> tuple[Contender, ...]:
    """A contender at its settings in fp32, and the same with less precision here or there."""
    fp32 = replace(contender, name="fp32", settings={**contender.settings, "matmul_precision": "highest"}, axes=())
    named = {name.replace("_", " "): settings for name, settings in variants.items()}
    return fp32, *(replace(fp32, name=name, settings={**fp32.settings, **each}) for name, each in named.items())


# What rounding to bfloat16 costs.
_ROOTS, _EXCHANGE, _ITERATIONS = (
    {"root_dtype": "bfloat16"},
    {"exchange_dtype": "bfloat16"},
    {"matmul_precision": "medium"},
)

SHAMPOO_BF16 = replace(
    GPT_MODERN,
    name="shampoo_bf16",
    title="Shampoo with less precision: the byte GPT of 3.5M parameters",
    tuning=None,
    alike=True,
    contenders=_less_precise(SHAMPOO, bf16_roots=_ROOTS, bf16_exchange=_EXCHANGE),
)

POLAR_BF16 = replace(
    SHAMPOO_BF16,
    name="polar_bf16",
    title="Polar with less precision: the byte GPT of 3.5M parameters",
    contenders=_less_precise(
        POLAR, bf16_iterations=_ITERATIONS, bf16_iterations_roots_and_exchange={**_ITERATIONS, **_ROOTS, **_EXCHANGE}
    ),
)

STUDIES = (GPT_MODERN, GPT_MODERN_BPE, GPT_MODERN_12M, BERT, TRANSLATION, CLICKS, IMAGES, SHAMPOO_BF16, POLAR_BF16)
