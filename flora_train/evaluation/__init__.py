"""How good is each adapter? Held-out comparison with intervals, completions, and the report."""
