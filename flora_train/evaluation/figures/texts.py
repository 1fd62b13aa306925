"""Names and explanations of figures, the same wherever they are shown."""

from __future__ import annotations

from dataclasses import dataclass

from flora_train.evaluation.figures.result_types import FigureResult


@dataclass(frozen=True)
class FigureText:
    """How a figure is shown."""

    name: str
    """For tables and trackers, such as `macro F1`."""
    meaning: str
    """What it is, for the caption of a table."""
    in_percent: bool = True
    """Whether it is shown times 100."""
    lower_is_better: bool = False
    digits: int = 3
    """Decimals, where it is not shown times 100."""

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence. Names such as chrF and my_metrics:score stay the same."""
        first = self.name.partition(" ")[0]
        if not first.isalpha() or not first.islower():
            return self.name
        return f"{first.capitalize()}{self.name[len(first) :]}"


FIGURES = {
    "accuracy": FigureText("accuracy", "examples whose label is right"),
    "balanced_accuracy": FigureText(
        "balanced accuracy", "mean recall of the labels, each with the same weight"
    ),
    "macro_f1": FigureText("macro F1", "mean F1 of the labels, each with the same weight"),
    "weighted_f1": FigureText("weighted F1", "mean F1 of the labels, weighted by their frequency"),
    "mcc": FigureText(
        "MCC", "Matthews' correlation of predictions and references, 0 for a constant", in_percent=False
    ),
    "auroc": FigureText(
        "AUROC", "area under the ROC curve, of several labels the mean of each against the rest"
    ),
    "micro_f1": FigureText("micro F1", "F1 of all labels of all examples together"),
    "subset_accuracy": FigureText("subset accuracy", "examples of which every label is right"),
    "mse": FigureText(
        "mean squared error", "of predicted and given numbers", in_percent=False, lower_is_better=True
    ),
    "mae": FigureText(
        "mean absolute error", "of predicted and given numbers", in_percent=False, lower_is_better=True
    ),
    "r2": FigureText("R2", "share of the variance that is predicted", in_percent=False),
    "pearson": FigureText("Pearson", "linear correlation", in_percent=False),
    "spearman": FigureText("Spearman", "rank correlation", in_percent=False),
    "token_accuracy": FigureText("token accuracy", "tokens whose label is right"),
    "token_macro_f1": FigureText(
        "token macro F1", "mean F1 of the labels of tokens, each with the same weight"
    ),
    "entity_f1": FigureText("entity F1", "F1 of whole entities, as seqeval computes it"),
    "exact_match": FigureText("exact match", "answers that equal the completion"),
    "rouge_l": FigureText("ROUGE-L", "longest common subsequence of words, F-measure as in rouge_score"),
    "chrf": FigureText("chrF", "n-grams of characters, 0 to 100, as in sacrebleu", False, digits=1),
    "bleu": FigureText("BLEU", "n-grams of words, 0 to 100, as in sacrebleu", False, digits=1),
    "recall_at_1": FigureText(
        "recall at 1", "anchors whose positive is the closest of all held-out texts that it is searched among"
    ),
    "mrr": FigureText("MRR", "mean of 1 / rank of the positive by its similarity to the anchor"),
    "contrastive_loss": FigureText(
        "contrastive loss", "mean loss of a held-out pair in a group", False, lower_is_better=True
    ),
    "perplexity": FigureText(
        "perplexity", "exp of the held-out loss per token of this tokenizer", False, True, digits=2
    ),
}
"""Figure -> how it is shown. Functions of the user's own are not in it."""


def text_of(result: FigureResult) -> FigureText:
    """How the figure of a result is shown."""
    own = FigureText(result.figure, "a function of the recipe's own", False, result.lower_is_better)
    return FIGURES.get(result.figure, own)


def key_of(figure: str) -> str:
    """A figure's key for trackers and cards: module:function is module.function."""
    return figure.replace(":", ".")
