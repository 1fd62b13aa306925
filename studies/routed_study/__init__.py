"""What studies/routed.py and studies/gates.py are made of."""
