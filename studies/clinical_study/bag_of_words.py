"""Baselines that need no encoder: the most frequent label, and TF-IDF with logistic regression."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from .tasks import StudyError, StudyTask

STRENGTH = 1.0
"""C of the logistic regression, chosen on the development texts among 1, 10, 100 and 1,000."""
WEIGHTS: Literal["balanced"] | None = "balanced"
"""class_weight, chosen there between none and balanced."""


def majority(task: StudyTask) -> list[str]:
    """The most frequent training label for every text; of several, the first by name."""
    counts = Counter(task.train.labels)
    most = min(counts, key=lambda label: (-counts[label], label))
    return [most] * len(task.test.texts)


def tfidf(
    task: StudyTask, strength: float = STRENGTH, weights: Literal["balanced"] | None = WEIGHTS
) -> list[str]:
    """Logistic regression on TF-IDF of words and pairs of words."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise StudyError("scikit-learn is not installed: pip install scikit-learn") from None
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=strength, class_weight=weights, max_iter=2000),
    )
    model.fit(task.train.texts, task.train.labels)
    return [str(label) for label in model.predict(task.test.texts)]
