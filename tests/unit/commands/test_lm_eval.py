"""flora-train lm-eval without lm_eval says what to install."""

from __future__ import annotations

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.harness import package


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"lm-eval: needs the package lm_eval: pip install 'flora-train\[lm-eval\]'"
    ):
        package.check_installed()
