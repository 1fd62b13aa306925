"""Sparse changes of a weight: values at the indices of a mask that all adapters of a batch share."""
