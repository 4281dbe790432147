"""Few-shot evaluation in parts; :mod:`metasft.evaluation` puts them together."""
