"""Labelled texts for classification: diagnoses of ICD-10-CM by block, e-mails that are spam or not."""
